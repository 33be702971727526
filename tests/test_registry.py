"""Component names are file names, and nothing else can be imported."""

from __future__ import annotations

import pytest

from unilatent.methods.base import LatentModel
from unilatent.modalities.base import Modality
from unilatent.registry import BASES, available, find


@pytest.mark.parametrize("kind", BASES)
def test_every_component_is_found_under_the_name_its_config_carries(kind: str):
    names = available(kind)
    assert names and list(names) == sorted(names) and "base" not in names
    for name in names:
        cls = find(kind, name)
        assert cls.Config.small().name == name and cls.__module__.startswith(f"unilatent.{kind}.{name}")
        assert find(kind, name) is cls and not getattr(cls, "__abstractmethods__", None)


def test_known_components():
    assert issubclass(find("methods", "unite"), LatentModel) and issubclass(find("modalities", "image"), Modality)


@pytest.mark.parametrize(
    "name", ["os", "os.system", "base", "unite.UNITE", "../config", "", "UNITE", "unilatent.methods.unite"]
)
def test_a_name_that_is_no_file_here_is_refused(name: str):
    with pytest.raises(ValueError, match=r"methods name .* is unknown; available: .*unite"):
        find("methods", name)


def test_a_kind_that_is_none_is_refused():
    with pytest.raises(ValueError, match="kind 'os' is unknown; use one of methods, modalities, conditions"):
        find("os", "system")
