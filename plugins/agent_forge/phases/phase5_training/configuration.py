"""Settings that a program may change until they are in use: the base of all Phase 5 settings.

A subclass is a dataclass by inheritance alone; its fields are read here.
"""

from __future__ import annotations

import copy
import enum
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from types import MappingProxyType, NoneType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Self,
    TypeVar,
    dataclass_transform,
    get_args,
    get_type_hints,
)
from typing import get_origin as origin_of

import msgspec

from forge_kernel.embedding import ConfigError, Fault, did_you_mean

Group = TypeVar("Group", bound="Configuration")


class SettingError(ConfigError):
    """A setting was given a value that it cannot take, or too late."""


class UnknownSettingError(ConfigError, AttributeError, TypeError):
    """There is no setting of this name."""


@dataclass_transform(kw_only_default=True, field_specifiers=(field,))
class Configuration:
    """A group of settings.

    Each assignment is checked: the name, the type, and the bounds that the field's `Annotated[...,
    Meta(...)]` states. A mapping stands for a nested group, the name of a member for an enum.

    A subclass may set:

    - `aliases`: other names of fields, readable and writable (alias -> field);
    - `without_meaning`: fields kept for programs that name them, with the reason why nothing but
      the default is taken (field -> reason).

    `torch.save` writes a group as an ordered dictionary of plain values, so that the default
    `torch.load` takes it in a process that knows nothing of this package; other pickling (to a
    worker process) and `copy` keep the class. A copy is open again.

    Raises:
        UnknownSettingError, SettingError: from the constructor and from each assignment.
    """

    aliases: ClassVar[Mapping[str, str]] = MappingProxyType({})
    without_meaning: ClassVar[Mapping[str, str]] = MappingProxyType({})
    _locked: ClassVar[str] = ""  # shadowed in the instance by `lock`
    _given: ClassVar[frozenset[str]] = frozenset()  # likewise, by each assignment
    _resolved: ClassVar[dict[str, Any]]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        dataclass(init=False)(cls)
        names = {item.name for item in fields(cls)}  # type: ignore[arg-type]
        assert set(cls.aliases.values()) | set(cls.without_meaning) <= names, cls
        assert not set(cls.aliases) & names, cls

    def __init__(self, *given: Any, **values: Any) -> None:
        names = _names(type(self))
        if len(given) > len(names):
            raise SettingError(f"{type(self).__name__} has {len(names)} settings, not {len(given)}")
        chosen = dict(zip(names, given, strict=False))
        for name, value in values.items():
            known = self._field(name)
            if known in chosen:
                raise SettingError(f"{type(self).__name__}.{known} is given twice (as {name} too)")
            chosen[known] = value
        for item in fields(self):  # type: ignore[arg-type]
            factory = item.default_factory
            default = item.default if factory is MISSING else factory()
            value = chosen.get(item.name, default)
            if value is MISSING:
                raise SettingError(f"{type(self).__name__} needs {item.name}")
            setattr(self, item.name, value)
        object.__setattr__(self, "_given", frozenset(chosen))

    def given(self, name: str) -> bool:
        """Whether the program set the field itself, be it to its default."""
        return self._field(name) in self._given

    def assigned(self, name: str) -> bool:
        """Whether the program set the field itself to another value than its default."""
        known = self._field(name)
        return known in self._given and bool(getattr(self, known) != _default(type(self), known))

    def refuse(self, name: str, reason: str) -> None:
        """Refuse a field that was assigned where nothing would read it.

        Raises:
            SettingError: it was, with the reason.
        """
        if self.assigned(name):
            value = getattr(self, self._field(name))
            place = f"{type(self).__name__}.{name}"
            raise SettingError(
                [Fault(f"{_plain(value)!r} would not be read: {reason}", path=place)]
            )

    def _field(self, name: str) -> str:
        """The field of a name or alias."""
        known = self.aliases.get(name, name)
        names = _names(type(self))
        if known not in names:
            hints = did_you_mean(name, [*names, *self.aliases])
            hints = hints or (f"settings: {', '.join(names)}",)
            raise UnknownSettingError(
                [Fault(f"{type(self).__name__} has no setting '{name}'", hints=hints)]
            )
        return known

    def __setattr__(self, name: str, value: Any) -> None:
        known = self._field(name)
        if self._locked:
            raise SettingError(f"{type(self).__name__}.{name} {self._locked}")
        object.__setattr__(self, known, self._taken(known, value))
        object.__setattr__(self, "_given", self._given | {known})

    def __delattr__(self, name: str) -> None:
        raise SettingError(f"{type(self).__name__}.{name} cannot be deleted")

    def __getattr__(self, name: str) -> Any:
        known = type(self).aliases.get(name)
        if known is None:
            raise AttributeError(f"{type(self).__name__} has no setting '{name}'")
        return getattr(self, known)

    def _taken(self, name: str, value: Any) -> Any:
        """The value as the field keeps it, checked."""
        place = f"{type(self).__name__}.{name}"
        try:
            taken = _converted(value, _hints(type(self))[name])
        except (ConfigError, msgspec.ValidationError, TypeError, ValueError) as error:
            raise SettingError([Fault(f"{value!r}: {error}", path=place)]) from error
        reason = type(self).without_meaning.get(name)
        if reason is not None and taken != _default(type(self), name):
            default = _default(type(self), name)
            raise SettingError([Fault(f"takes {default!r} only: {reason}", path=place)])
        return taken

    def check(self) -> None:
        """Check every field again, for what was changed inside a list; override to add more.

        Raises:
            SettingError: a value is wrong, or two of them contradict each other.
        """
        for name in _names(type(self)):
            value = getattr(self, name)
            self._taken(name, value)
            if isinstance(value, Configuration):
                value.check()

    def lock(self, reason: str) -> None:
        """Refuse each further change, here and in nested groups; a second lock changes nothing.

        Args:
            reason: ends the error's sentence: "was changed after setup(): ...".

        Raises:
            SettingError: see `check`.
        """
        if self._locked:
            return
        self.check()
        for name in _names(type(self)):
            value = getattr(self, name)
            if isinstance(value, Configuration):
                value.lock(reason)
            elif isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
            elif isinstance(value, dict):
                object.__setattr__(self, name, MappingProxyType(dict(value)))
        object.__setattr__(self, "_locked", reason)

    @property
    def locked(self) -> bool:
        """Whether changes are refused."""
        return bool(self._locked)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values: enums as their names, nested groups as dictionaries."""
        return {name: _plain(getattr(self, name)) for name in _names(type(self))}

    def __copy__(self) -> Self:
        values = {name: _open(getattr(self, name)) for name in _names(type(self))}
        return _rebuilt(type(self), values, "", self._given)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        values = {name: _open(getattr(self, name)) for name in _names(type(self))}
        copied = {name: copy.deepcopy(value, memo) for name, value in values.items()}
        return _rebuilt(type(self), copied, "", self._given)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if protocol < 3:  # torch.save writes with protocol 2; process pools use a newer one
            return OrderedDict, (), None, None, iter(self.to_dict().items())
        values = {name: _open(getattr(self, name)) for name in _names(type(self))}
        return _rebuilt, (type(self), values, self._locked, self._given)


def _rebuilt(
    group: type[Group], values: dict[str, Any], locked: str, given: frozenset[str]
) -> Group:
    made = group(**values)
    object.__setattr__(made, "_given", given)
    if locked:
        made.lock(locked)
    return made


def _names(group: Any) -> tuple[str, ...]:
    return tuple(item.name for item in fields(group))


def _hints(group: Any) -> dict[str, Any]:
    """The fields' types, worked out once: the names that they use exist when a value is set."""
    known: dict[str, Any] | None = vars(group).get("_resolved")
    if known is None:
        known = get_type_hints(group, include_extras=True)
        group._resolved = known
    return known


def _default(group: Any, name: str) -> Any:
    item = next(item for item in fields(group) if item.name == name)
    return item.default if item.default_factory is MISSING else item.default_factory()


def _open(value: Any) -> Any:
    """What a lock froze, as it was."""
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, MappingProxyType) else value


def _choices(hint: Any) -> list[type]:
    """The classes of a hint, without `Annotated` and `None`."""
    if origin_of(hint) is Annotated:
        hint = get_args(hint)[0]
    parts: Iterable[Any] = get_args(hint) if NoneType in get_args(hint) else (hint,)
    return [part for part in parts if isinstance(part, type) and part is not NoneType]


def _converted(value: Any, hint: Any) -> Any:
    """The value in the type that the hint names.

    Raises:
        TypeError, ValueError, msgspec.ValidationError, ConfigError: it does not fit.
    """
    if hint is Any:
        return value
    choices = _choices(hint)
    if len(choices) == 1:
        kind = choices[0]
        if isinstance(value, kind) and issubclass(kind, Configuration | enum.Enum):
            return value
        if issubclass(kind, Configuration) and isinstance(value, Mapping):
            return kind(**value)
        if issubclass(kind, enum.Enum) and isinstance(value, str):
            return _member(kind, value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    return msgspec.convert(_open(value), hint, dec_hook=_instance)


def _member(kind: type[enum.Enum], name: str) -> enum.Enum:
    result = {member.name.lower(): member for member in kind}
    if name.lower() not in result:
        raise ValueError(f"is none of {', '.join(member.name for member in kind)}")
    return result[name.lower()]


def _instance(kind: type, value: Any) -> Any:
    """For classes that msgspec does not know (a torch.dtype): the value is one already, or not."""
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.name
    return json.loads(json.dumps(value, default=_leaf))


def _leaf(value: Any) -> Any:
    """What JSON knows, for what it does not."""
    if isinstance(value, Configuration):
        return value.to_dict()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, enum.Enum):
        return value.name
    return value.tolist() if hasattr(value, "tolist") else str(value)
