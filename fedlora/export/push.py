"""What was exported, on the hub: private unless said otherwise, and never where more may see it than asked for."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from fedlora.data.hub import hub_within_reach
from fedlora.errors import ConfigError, IncompleteError


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """address: of the repository. private: whether only its owner sees it, as the hub says, whatever was asked for."""

    address: str
    private: bool


def require_pushable(repository: str) -> None:
    """Passes where a push can begin: a name, a token, and a hub that answers. Nothing is written, here or there.

    Raises:
        ConfigError: the name is none that a hub has, or there is no token.
        IncompleteError: the hub is out of reach.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError:
        repository = ""
    if repository.count("/") != 1:
        raise ConfigError(
            f"--push {repository!r}: not OWNER/NAME; write for example --push hospital/triage-lora"
        )
    if get_token() is None:
        raise ConfigError("--push: no token of the hub on this machine; run `hf auth login`, or set HF_TOKEN")
    if not hub_within_reach():
        raise IncompleteError(
            "--push: the hub is out of reach; give the command again where it is not, or export --to a directory and "
            "carry that there (HF_HUB_OFFLINE is to be unset)"
        )


def push(directory: Path, repository: str, *, private: bool) -> Pushed:
    """Where the repository is, whose files are now those of the directory, its card included, and no others.

    What was there before is in its history. Its .gitattributes, which is the hub's, stays.

    Args:
        directory: as `write_adapter` left it.
        repository: OWNER/NAME; made if it is not there.
        private: whether only its owner may see it. One that is there and is private stays so.

    Raises:
        ConfigError: the repository is public already, and private was asked for.
        IncompleteError: the hub refused.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        is_private = bool(api.repo_info(repository).private)
        if private and not is_private:
            raise ConfigError(
                f"--push: {repository} is there already and is public; name another one, or say --public if it may be"
            )
        api.upload_folder(
            repo_id=repository,
            folder_path=directory,
            commit_message="An adapter by fedlora",
            delete_patterns="*",  # transformers would load an older adapter onto a merged model
        )
    except (HfHubHTTPError, OSError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise IncompleteError(
            f"--push: the hub refused {repository} ({said}); nothing here is lost: give the command again, with a "
            "token that may write there"
        ) from error
    return Pushed(address=str(address), private=is_private)
