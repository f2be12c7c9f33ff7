"""What is wrong with a parsed YAML, in the words of the person who wrote it.

The schema's own error reports name union branches and types of Python; these name the user's keys, the values
that are allowed and the nearest key. The walk looks at annotations only, so a new knob needs nothing here.
"""

import difflib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from fedlora.config.yaml_text import KeyPath

_SHOWN = 60
"""Characters of a wrong value that an error repeats."""
_SYNONYMS = {"rank": "r", "learning_rate": "lr", "clip": "max_grad_norm", "epochs": "local_steps"}
"""Names that other tools give to our keys, where no letters tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing to mend: where, what is wrong, what to write instead."""

    path: KeyPath
    wrong: str
    mend: str


def problems(value: Any, model: type[BaseModel], path: KeyPath = ()) -> Iterator[Problem]:
    """Everything in `value` that keeps it from being a `model`, top to bottom; combinations apart."""
    if not isinstance(value, dict):
        yield Problem(path=path, wrong=f"{shown(value)} is not a section", mend=f"write {wanted(model)}")
        return
    fields = get_type_hints(model, include_extras=True)
    names = list(model.model_fields)
    for key in value:
        if key not in names:
            inside = [".".join(map(str, (*path, *place))) for place in _places(key, model)]
            mend = f"write {' or '.join(inside)}" if inside else _mend_key(key, names, value)
            yield Problem(path=(*path, key), wrong="unknown key", mend=mend)
    for name in names:
        if name in value:
            yield from _of_annotation(value[name], fields[name], (*path, name))
        elif model.model_fields[name].is_required():
            yield Problem(path=(*path, name), wrong="missing", mend=f"write {wanted(fields[name])}")


def _places(key: str, model: type[BaseModel]) -> list[KeyPath]:
    """Where in sections of this one there is such a key, if in one or two places."""
    found: dict[KeyPath, None] = {}
    for name, annotation in get_type_hints(model, include_extras=True).items():
        for section in sections_in(annotation):
            found |= dict.fromkeys([(name, key)] if key in section.model_fields else [])
            found |= dict.fromkeys((name, *place) for place in _places(key, section))
    return list(found) if len(found) <= 2 else []


def _of_annotation(value: Any, annotation: Any, path: KeyPath) -> Iterator[Problem]:
    branches, tag = _branches(annotation), _tag(annotation)
    sections = [branch for branch in branches if _is_section(branch)]
    if tag is not None:
        yield from _of_tagged(value, sections, tag, path)
    elif sections and (isinstance(value, dict) or len(branches) == 1):
        yield from problems(value, sections[0], path)
    else:
        yield from _of_leaf(value, annotation, path)


def _of_tagged(value: Any, sections: list[Any], tag: str, path: KeyPath) -> Iterator[Problem]:
    """The tag (`kind`, `name`, `source`) picks the section whose keys are then looked at."""
    choices = {str(get_args(section.model_fields[tag].annotation)[0]): section for section in sections}
    allowed = ", ".join(choices)
    if not isinstance(value, dict):
        mend = f"write a mapping with {tag}: one of {allowed}"
        yield Problem(path=path, wrong=f"{shown(value)} is not a section", mend=mend)
    elif tag not in value:
        yield Problem(path=(*path, tag), wrong="missing", mend=f"write one of {allowed}")
    elif not isinstance(value[tag], str) or value[tag] not in choices:
        mend = _nearest_of(value[tag], list(choices))
        yield Problem(path=(*path, tag), wrong=f"{shown(value[tag])} is not known", mend=mend)
    else:
        for problem in problems(value, choices[value[tag]], path):
            yield _with_owner(problem, path, tag, choices)


def _with_owner(problem: Problem, path: KeyPath, tag: str, choices: dict[str, Any]) -> Problem:
    """The problem, saying so where the unknown key belongs to a sibling section."""
    key = problem.path[-1]
    owners = [name for name, section in choices.items() if key in section.model_fields]
    if problem.wrong != "unknown key" or problem.path[:-1] != path or not owners:
        return problem
    mend = f"remove it, or write {tag}: {' or '.join(owners)}, which has it"
    return Problem(path=problem.path, wrong="unknown key", mend=mend)


def _of_leaf(value: Any, annotation: Any, path: KeyPath) -> Iterator[Problem]:
    try:
        _validator(annotation).validate_python(value)
    except ValidationError:
        yield Problem(path=path, wrong=f"{shown(value)} does not fit", mend=_mend_leaf(value, annotation))


@cache
def _validator(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=ConfigDict(strict=True, allow_inf_nan=False))


def _mend_leaf(value: Any, annotation: Any) -> str:
    kinds = [_strip(branch) for branch in _branches(annotation)]
    words = [str(word) for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if isinstance(value, str) and words and len(kinds) == 1:
        return _nearest_of(value, words)
    if str in kinds and isinstance(value, int | float):
        return f'put it in quotes: "{value}"'
    return f"write {wanted(annotation)}"


def _mend_key(key: str, names: list[str], siblings: dict[str, Any]) -> str:
    missing = [name for name in names if name not in siblings]
    near = [name for name in names if name == _SYNONYMS.get(key)]
    for meant, cutoff in ((names, 0.8), (missing, 0.5), (names, 0.6)):
        near = near or difflib.get_close_matches(key, meant, n=1, cutoff=cutoff)
    if near and near[0] in siblings:
        return f"did you mean {near[0]}? that is set already: change that one instead"
    if near:
        return f"write {near[0]}"
    return f"remove it; keys here are {', '.join(names)}"


def _nearest_of(value: Any, words: list[str]) -> str:
    near = difflib.get_close_matches(str(value), words, n=1, cutoff=0.5)
    allowed = ", ".join(words)
    return f"write {near[0]} (allowed: {allowed})" if near and len(words) > 1 else f"write {_one_of(words)}"


def _one_of(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"one of {', '.join(words)}"


def shown(value: Any) -> str:
    """The value as a YAML author would recognise it, on one line and not too long."""
    if isinstance(value, dict):
        return f"a mapping of {', '.join(map(str, value)) or 'nothing'}"[:_SHOWN]
    if isinstance(value, list):
        text = f"[{', '.join(shown(item) for item in value[:5])}{', ...' if len(value) > 5 else ''}]"
    elif value is None or isinstance(value, bool):
        text = "null" if value is None else str(value).lower()
    else:
        text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def wanted(annotation: Any) -> str:
    """What may stand there: `a whole number >= 1`, `one of sgd, adamw`, `a mapping with kind`."""
    if (tag := _tag(annotation)) is not None:
        words = [str(get_args(section.model_fields[tag].annotation)[0]) for section in _branches(annotation)]
        return f"a mapping with {tag}: {_one_of(words)}"
    branches = _branches(annotation)
    if len(branches) > 1:
        return ", or ".join(wanted(branch) for branch in branches)
    inner, bounds = _strip(annotation), _bounds(annotation)
    if _is_section(inner):
        required = [name for name, field in inner.model_fields.items() if field.is_required()]
        return f"a mapping with {', '.join(required)}" if required else "a mapping"
    return _wanted_plain(inner, bounds)


def _wanted_plain(inner: Any, bounds: dict[str, Any]) -> str:
    origin, arguments = get_origin(inner), get_args(inner)
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    limits = " and ".join(f"{sign} {bounds[name]}" for name, sign in signs.items() if name in bounds)
    if origin is Literal:
        return _one_of([str(word) for word in arguments])
    if origin is list:
        least, most = bounds.get("min_length"), bounds.get("max_length")
        count = (
            f"of {least}"
            if least is not None and least == most
            else f"of {least} or more"
            if least
            else "of any length"
        )
        return f"a list {count}, each {wanted(arguments[0])}"
    if origin is dict:
        return f"a mapping from names to {wanted(arguments[1])}"
    name = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }.get(inner)
    return f"{name or inner} {limits}".strip()


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that may stand there, or lie in what may."""
    found: list[type[BaseModel]] = []
    for branch in _branches(annotation):
        kind = _strip(branch)
        if _is_section(kind):
            found.append(kind)
        else:
            found += [section for argument in get_args(kind) for section in sections_in(argument)]
    return found


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _strip(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _branches(annotation: Any) -> list[Any]:
    """The alternatives of a union; an annotation that is none is its own only branch."""
    inner = _strip(annotation)
    if get_origin(inner) in (Union, types.UnionType):
        return [leaf for branch in get_args(inner) for leaf in _branches(branch)]
    return [annotation]


def _tag(annotation: Any) -> str | None:
    extras = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    return next((extra.discriminator for extra in extras if getattr(extra, "discriminator", None)), None)


def _bounds(annotation: Any) -> dict[str, Any]:
    """The limits in an annotation by name: gt, ge, lt, le, min_length, max_length."""
    extras = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    limits = [limit for extra in extras for limit in getattr(extra, "metadata", [extra])]
    names = ("gt", "ge", "lt", "le", "min_length", "max_length")
    return {
        name: getattr(limit, name)
        for limit in limits
        for name in names
        if getattr(limit, name, None) is not None
    }
