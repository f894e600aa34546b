"""The plugins that are installed, known by kind and name before any of them is imported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Final

from forge_kernel.config.spelling import did_you_mean
from forge_kernel.contract.metric_info import MetricInfo
from forge_kernel.contract.plugin import API_VERSION, Kind, PluginInfo
from forge_kernel.contract.plugin_rules import PluginRules
from forge_kernel.errors import Fault, PluginError
from forge_kernel.planning.plugin_lock import difference, read_lock

GROUP: Final = "forge_kernel.plugins"
_KINDS: Final = frozenset(Kind)


@dataclass(frozen=True, slots=True)
class Offer:
    """One entry point: who offers which plugin."""

    kind: Kind
    name: str
    target: str
    distribution: str
    version: str
    entry: EntryPoint | None = field(default=None, compare=False)

    @property
    def key(self) -> str:
        """`"<kind>.<name>"`."""
        return f"{self.kind}.{self.name}"

    @property
    def origin(self) -> str:
        """Distribution and version."""
        return f"{self.distribution} {self.version}".strip()


def _origin(entry: EntryPoint, known: dict[int, tuple[str, str]]) -> tuple[str, str]:
    """Name and version of the distribution; its metadata is parsed once, not for each entry."""
    if entry.dist is None:
        return "unknown distribution", ""
    key = id(entry.dist)
    if key not in known:
        metadata = entry.dist.metadata
        known[key] = (metadata["Name"], metadata["Version"])
    return known[key]


def _offer(entry: EntryPoint, known: dict[int, tuple[str, str]]) -> Offer | str:
    """Read an entry point, or say what is wrong with its name."""
    kind, dot, name = entry.name.partition(".")
    distribution, version = _origin(entry, known)
    if not dot or not name or kind not in _KINDS:
        kinds = ", ".join(Kind)
        return (
            f"{distribution} {version}: the entry point '{entry.name}' must be named "
            f"'<kind>.<name>' with one of the kinds {kinds}"
        )
    return Offer(Kind(kind), name, entry.value, distribution, version, entry)


def check_class(plugin: Any, kind: Kind, name: str) -> str | None:
    """What is wrong with a plugin class, if anything."""
    info = getattr(plugin, "info", None)
    if not isinstance(plugin, type) or not isinstance(info, PluginInfo):
        return "is not a plugin class: it has no `info = PluginInfo(...)`"
    if (info.kind, info.name) != (kind, name):
        return f"its info says '{info.key}', its entry point '{kind}.{name}'"
    return _check_api(info.api) or _check_settings(info)


def _check_api(api: Any) -> str | None:
    if not isinstance(api, tuple) or [type(bound) for bound in api] != [int, int]:
        return f"its api range is {api!r}, not a pair of whole numbers"
    low, high = api
    if not low <= API_VERSION <= high:
        return f"it is written for plugin interface {low} to {high}, this kernel has {API_VERSION}"
    return None


def _check_settings(info: PluginInfo) -> str | None:
    if not isinstance(info.config, type) or not is_dataclass(info.config):
        return "its settings (info.config) are no dataclass"
    return None


class Catalog:
    """Lazy look-up of plugin classes; a broken one does not stand in the way of others."""

    def __init__(self, offers: Iterable[Offer] = (), misnamed: Iterable[str] = ()) -> None:
        self._offers: dict[tuple[Kind, str], list[Offer]] = {}
        self.misnamed = tuple(misnamed)
        self._classes: dict[tuple[Kind, str], type[Any]] = {}
        self.rules = PluginRules()
        self._lock: Mapping[str, Mapping[str, str]] | None = None
        for offer in offers:
            self._offers.setdefault((offer.kind, offer.name), []).append(offer)

    @classmethod
    def installed(cls) -> Catalog:
        """What the distributions of this Python offer."""
        entries = entry_points(group=GROUP)
        known: dict[int, tuple[str, str]] = {}
        read = [_offer(entry, known) for entry in entries]
        return cls(
            [offer for offer in read if isinstance(offer, Offer)],
            [text for text in read if isinstance(text, str)],
        )

    def under(self, rules: PluginRules) -> Catalog:
        """The same plugins; those that the rules refuse are known by name and not imported.

        Raises:
            ConfigError: the lock file cannot be read.
        """
        if rules == self.rules:
            return self
        result = Catalog(misnamed=self.misnamed)
        result._offers, result._classes, result.rules = self._offers, self._classes, rules
        result._lock = None if rules.lock is None else read_lock(Path(rules.lock))
        return result

    def add(self, plugin: type[Any]) -> None:
        """Offer a class of this process; it stands beside the installed ones."""
        info: PluginInfo = plugin.info
        target = f"{plugin.__module__}:{plugin.__qualname__}"
        offer = Offer(info.kind, info.name, target, "this process", "")
        self._offers.setdefault((info.kind, info.name), []).append(offer)
        self._classes[info.kind, info.name] = plugin

    def offers(self) -> Iterator[Offer]:
        """All offers by kind (canonical order) and name; doubled ones follow each other."""
        for kind in Kind:
            for found_kind, name in sorted(self._offers):
                if found_kind is kind:
                    yield from self._offers[kind, name]

    def names(self, kind: Kind) -> list[str]:
        """All names of a kind."""
        return sorted(name for result, name in self._offers if result is kind)

    def find(self, name: str) -> list[tuple[Kind, str]]:
        """Plugins by name or by `<kind>.<name>`, for a user who asks about one."""
        return [key for key in sorted(self._offers) if name in (key[1], f"{key[0]}.{key[1]}")]

    def offer(self, kind: Kind, name: str) -> Offer:
        """The one offer of a plugin.

        Raises:
            PluginError: nobody offers it, or more than one distribution does.
        """
        result = self._offers.get((kind, name), [])
        if not result:
            known = self.names(kind)
            hints = (*did_you_mean(name, known), f"allowed: {', '.join(known) or 'none'}")
            raise PluginError([Fault(f"no plugin '{name}' of the kind {kind}", hints=hints)])
        if len(result) > 1:
            who = " and ".join(f"{offer.origin} ({offer.target})" for offer in result)
            hint = "uninstall one of them, or ask its author for another name"
            message = f"'{kind}.{name}' is offered twice: by {who}"
            raise PluginError([Fault(message, hints=(hint,))])
        (offer,) = result
        if offer.entry is not None:  # a class of this process is there already
            self._check_rules(offer)
        return offer

    def _check_rules(self, offer: Offer) -> None:
        """Refuse, before it is imported, what the pipeline does not allow."""
        if not self.rules.allows(offer.distribution):
            message = f"'{offer.key}' of {offer.origin} is not allowed by plugins.allow"
            hint = f"if it is to be used, add {offer.distribution} to plugins.allow"
            raise PluginError([Fault(message, hints=(hint,))])
        otherwise = None if self._lock is None else difference(self._lock, offer)
        if otherwise is not None:
            hint = f"if that is right, `forge lock FILE` writes {self.rules.lock} anew"
            raise PluginError([Fault(otherwise, hints=(hint,))])

    def load(self, kind: Kind, name: str) -> type[Any]:
        """Import a plugin class and check its card.

        Raises:
            PluginError: not offered, offered twice, not importable, or its card is wrong.
        """
        offer = self.offer(kind, name)
        known = self._classes.get((kind, name))
        if known is None:
            assert offer.entry is not None, "an offer without an entry point has its class"
            try:
                known = offer.entry.load()
            except (Exception, SystemExit) as error:
                why = f"{type(error).__name__}: {error}"
                message = f"'{offer.key}' of {offer.origin} cannot be loaded: {why}"
                raise PluginError([Fault(message, hints=("see: forge plugins",))]) from error
        wrong = check_class(known, kind, name)
        if wrong is not None:
            raise PluginError(f"'{offer.key}' of {offer.origin} ({offer.target}): {wrong}")
        assert isinstance(known, type)
        self._classes[kind, name] = known
        return known

    def metrics(self) -> Iterator[MetricInfo]:
        """What the plugins say of the metrics they log; one that cannot be loaded is left out."""
        for kind, name in list(self._offers):
            try:
                yield from self.load(kind, name).info.metrics
            except PluginError:
                continue
