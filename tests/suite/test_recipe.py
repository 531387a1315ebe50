"""Recipes: strict keys, types from annotations, and files that read back as what was written."""

import tomllib
from dataclasses import dataclass, replace
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptsuite.errors import UsageError
from adaptsuite.plan import Plan
from adaptsuite.recipe import (
    DataSettings,
    Recipe,
    build,
    digest,
    from_dict,
    load_recipe,
    resolved,
    shipped_recipes,
    to_json,
    to_toml,
    with_settings,
)


@dataclass(frozen=True)
class Mixture:
    experts: int = 7
    normalise: bool = True
    sites: tuple[str, ...] = ("attn",)
    placement: Literal["parallel", "sequential"] = "parallel"
    scale: float | None = 1.0
    role: str | tuple[str, ...] = "attn"
    order: tuple[int, float] = (1, 0.5)
    slots: int | float = 1
    prefix: str | None = "x"
    options: dict | None = None

    def __post_init__(self):
        if self.experts < 1:
            raise ValueError("experts must be at least 1")


@dataclass(frozen=True)
class FrontEnd:
    sample_rate_hz: int
    frames: int = 500


SECTIONS = {"method_settings": Mixture, "front_end": FrontEnd}
BASE = Recipe("audio", method="audio.soft_moa")


def changed(text, recipe=BASE, method=Mixture, sections=None):
    return with_settings(recipe, [text], method, sections)


@pytest.mark.parametrize(
    "text, value",
    [
        ("experts=9", 9),
        (" experts = 9 ", 9),
        ("normalise=false", False),
        ("normalise=False", False),
        ("normalise=0", False),
        ("normalise=yes", True),
        ("sites=attn,mlp", ("attn", "mlp")),
        ("sites=attn, mlp", ("attn", "mlp")),
        ("sites=attn", ("attn",)),
        ("sites=", ()),
        ("placement=sequential", "sequential"),
        ("scale=2", 2.0),
        ("scale=1e-3", 1e-3),
        ("scale=none", None),
        ("role=mlp", "mlp"),
        ("role=attn,mlp", ("attn", "mlp")),
        ("order=2,.25", (2, 0.25)),
        ("slots=2", 2),
        ("slots=0.5", 0.5),
        ("prefix=none", None),
        ("prefix=a,b=c", "a,b=c"),
        ("options={a = 1, b = [2]}", {"a": 1, "b": (2,)}),
        ("method_settings.experts=9", 9),
    ],
)
def test_a_bare_key_is_a_method_setting_of_its_annotated_type(text, value):
    found = changed(text).method_settings[text.partition("=")[0].strip().split(".")[-1]]
    assert found == value and type(found) is type(value)


def test_dotted_keys_reach_every_section_and_names_the_recipe_itself():
    recipe = with_settings(
        BASE,
        ["plan.lr=1e-3", "plan.betas=.8,.9", "data.cv=fold", "data.val=none", "data.shots=4", "front_end.frames=100"],
        Mixture,
        SECTIONS,
    )
    assert recipe.plan == {"lr": 1e-3, "betas": (0.8, 0.9)} and recipe.front_end == {"frames": 100}
    assert recipe.data == DataSettings(cv="fold", val="none", shots=4)
    recipe = with_settings(recipe, ["seeds=0,1,2", "random_weights=true", "backbone=ast-base", "notes=a=b"], Mixture)
    assert (recipe.seeds, recipe.random_weights, recipe.backbone, recipe.notes) == ((0, 1, 2), True, "ast-base", "a=b")
    assert BASE == Recipe("audio", method="audio.soft_moa")


@pytest.mark.parametrize("text, rates", [("0.3,0.1", (0.3, 0.1)), ("1e-3", (1e-3,)), ("", ())])
def test_rates_to_choose_from_are_set_as_a_list(text, rates):
    recipe = with_settings(BASE, [f"lr_grid={text}", "refit=true"], Mixture)
    assert recipe.lr_grid == rates and recipe.refit is True
    assert from_dict(tomllib.loads(to_toml(recipe))) == recipe


def test_a_method_setting_goes_before_a_field_of_the_recipe_with_its_name():
    recipe = with_settings(BASE, ["notes=3"], {"notes": int})
    assert recipe.method_settings == {"notes": 3} and recipe.notes == ""


def test_choices_keep_their_type():
    kinds = {"bits": Literal[8, 16]}
    assert type(with_settings(BASE, ["bits=8"], kinds).method_settings["bits"]) is int
    with pytest.raises(UsageError, match="bits=8.0: expected 8 or 16"):
        from_dict({"domain": "audio", "method_settings": {"bits": 8.0}}, {"method_settings": kinds})


def test_the_last_of_two_settings_counts():
    assert with_settings(BASE, ["experts=2", "experts=3"], Mixture).method_settings == {"experts": 3}


def test_a_section_without_dataclass_takes_what_toml_reads():
    texts = ["head.width=3", "head.on=true", "head.pool=cls", "head.dims=[1, 2]", "head.odd=1\nwidth = 2"]
    recipe = with_settings(BASE, texts, Mixture)
    assert recipe.head == {"width": 3, "on": True, "pool": "cls", "dims": (1, 2), "odd": "1\nwidth = 2"}


@pytest.mark.parametrize(
    "text, message",
    [
        ("expert=9", r"--set expert: .*did you mean experts\?"),
        ("lr=1e-3", r"--set lr: .*did you mean plan\.lr\?"),
        ("cv=fold", r"did you mean data\.cv\?"),
        ("plan.experts=3", r"did you mean experts\?"),
        ("plan.lrr=1", r"--set plan\.lrr: .*did you mean lr\?"),
        ("plam.lr=1", r"no section 'plam'; did you mean plan\?"),
        ("front_end.frame=1", r"did you mean frames\?"),
        ("front_end.a.b=1", "no section 'front_end.a'"),
        ("method=lora", "--method"),
        ("domain=vision", "adapt DOMAIN"),
        ("experts", "'experts' is not of the form key=value"),
        ("=3", "not of the form"),
        ("experts=seven", "--set experts=seven: expected a whole number"),
        ("experts=7.0", "expected a whole number"),
        ("experts=none", "expected a whole number"),
        ("experts=", "expected a whole number"),
        ("normalise=maybe", "expected true or false"),
        ("normalise=2", "expected true or false"),
        ("scale=nan", "expected a finite number or none"),
        ("scale=inf", "expected a finite number or none"),
        ("scale=1e400", "expected a finite number or none"),
        ("placement=serial", "expected parallel or sequential"),
        ("order=1", "expected 2 items"),
        ("order=1,2,3", "expected 2 items"),
        ("options=3", "expected a table or none"),
        ("plan.schedule=cos", "expected cosine or constant"),
        ("plan.seed=true", "expected a whole number"),
        ("data.task=multi", "expected multiclass or multilabel or segmentation or free"),
        ("seeds=0,x", "expected a list of a whole number"),
        ("lr_grid=0.1,fast", "--set lr_grid=0.1,fast: expected a list of a finite number"),
        ("refit=maybe", "expected true or false"),
        ("plan.lr_grid=0.1", "--set plan.lr_grid: not a setting of plan"),
    ],
)
def test_a_wrong_setting_says_what_is_valid(text, message):
    with pytest.raises(UsageError, match=message) as caught:
        changed(text, sections=SECTIONS)
    assert "\n" not in str(caught.value)


# files

TOML = """
domain = "audio"
backbone = "embedded:audio-tiny"
method = "audio.soft_moa"
seeds = [0, 1]
[method_settings]
experts = 5
sites = ["attn", "mlp"]
[data]
cv = "fold"
val = "none"
[plan]
lr = 1
clip = "none"
"""


def test_a_file_is_read_with_types_of_the_fields(tmp_path):
    (tmp_path / "r.toml").write_text(TOML)
    recipe = load_recipe(tmp_path / "r.toml", "audio", SECTIONS)
    assert recipe.method_settings == {"experts": 5, "sites": ("attn", "mlp")}
    assert recipe.plan == {"lr": 1.0, "clip": None} and type(recipe.plan["lr"]) is float
    assert recipe.data == DataSettings(cv="fold", val="none") and recipe.seeds == (0, 1)
    (tmp_path / "r.json").write_text(to_json(recipe))
    assert load_recipe(tmp_path / "r.json", "audio", SECTIONS) == recipe


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("backbone", "backbon", r"r.toml: backbon is not a setting; did you mean backbone\?"),
        ("[plan]", "[plans]", "r.toml: plans is not a setting; did you mean plan"),
        ("experts", "expert", "r.toml: method_settings.expert is not a setting; did you mean experts"),
        ("experts = 5", "experts = true", "r.toml: method_settings.experts=True: expected a whole number"),
        ("experts = 5", 'experts = "5"', "method_settings.experts='5': expected a whole number"),
        ("experts = 5", "normalise = 0", "normalise=0: expected true or false"),
        ("lr = 1", "lr = nan", "r.toml: plan.lr=nan: expected a finite number"),
        ("lr = 1", f"lr = 1{'0' * 400}", "expected a finite number"),
        ("lr = 1", 'lr = "1e-3"', "expected a finite number"),
        ("lr = 1", "epochs = 2.0", "expected a whole number"),
        ('["attn", "mlp"]', '"attn"', "sites='attn': expected a list of a text"),
        ('["attn", "mlp"]', '["attn", 3]', "expected a list of a text"),
        ('cv = "fold"', "cv = 3", "r.toml: data.cv=3: expected a text or none"),
        ('cv = "fold"', 'cvs = "fold"', "r.toml: data.cvs is not a setting; did you mean cv"),
        ("seeds = [0, 1]", "seeds = 0", "r.toml: seeds=0: expected a list"),
        ("seeds = [0, 1]", "lr_grid = 0.1", "r.toml: lr_grid=0.1: expected a list of a finite number"),
        ("seeds = [0, 1]", "lr_grids = [0.1]", "r.toml: lr_grids is not a setting; did you mean lr_grid"),
        ("seeds = [0, 1]", "refit = 1", "r.toml: refit=1: expected true or false"),
        ("seeds = [0, 1]", "plan = 3", "r.toml: "),
        ('domain = "audio"', "", "r.toml: 'domain' is missing"),
        ('domain = "audio"', 'domain = "vision"', "r.toml is a recipe of 'vision', expected 'audio'"),
        ("[plan]", "[plan", r"recipe .*r.toml: .*line"),
    ],
)
def test_a_wrong_file_names_the_key_and_the_file(tmp_path, old, new, message):
    assert old in TOML
    (tmp_path / "r.toml").write_text(TOML.replace(old, new))
    with pytest.raises(UsageError, match=message):
        load_recipe(tmp_path / "r.toml", "audio", SECTIONS)


def test_reference_bug_09_keys_that_a_recipe_lacks_have_defaults(tmp_path):
    """The reference's YAML files lack keys that its scripts read: a KeyError, epochs into the run."""
    (tmp_path / "r.toml").write_text('domain = "audio"\nmethod = "audio.soft_moa"\n[front_end]\nsample_rate_hz = 16000')
    whole = resolved(load_recipe(tmp_path / "r.toml", "audio", SECTIONS), SECTIONS)
    assert whole.method_settings["experts"] == 7 and whole.plan["epochs"] == Plan().epochs


def test_reference_bug_10_false_is_false():
    """The reference's arguments have type=bool, for which the text "False" is true."""
    assert [changed(f"normalise={text}").method_settings["normalise"] for text in ("False", "no", "0")] == [False] * 3
    with pytest.raises(UsageError, match="expected true or false"):
        changed("normalise=flase")


def test_files_that_are_no_recipes_are_usage_errors(tmp_path):
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "folder.toml").mkdir()
    for name in ("bytes.toml", "deep.json", "list.json", "folder.toml", "absent.toml"):
        with pytest.raises(UsageError, match=name):
            load_recipe(tmp_path / name, "audio")
    with pytest.raises(UsageError, match="no recipe 'nothing-like-it' in audio"):
        load_recipe("nothing-like-it", "audio")


@pytest.mark.parametrize("domain", ["audio", "vision", "medical", "vl"])
def test_every_shipped_recipe_is_found_by_name_and_belongs_to_its_domain(domain):
    for name in shipped_recipes(domain):
        recipe = load_recipe(name, domain)
        assert recipe.domain == domain and recipe.method


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES = st.recursive(
    st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(TEXT, VALUES, max_size=4), st.dictionaries(TEXT, VALUES, max_size=3), TEXT, st.lists(st.integers())
)
def test_what_is_written_reads_back_equal(method_settings, head, notes, seeds):
    recipe = replace(BASE, method_settings=method_settings, head=head, notes=notes, seeds=tuple(seeds))
    read = from_dict(tomllib.loads(to_toml(recipe)))
    assert read == recipe and digest(read) == digest(recipe)


def test_a_resolved_recipe_reads_back_equal_with_none_where_it_was():
    recipe = with_settings(
        BASE, ["scale=none", "prefix=none", "plan.clip=none", "front_end.sample_rate_hz=16000"], Mixture
    )
    whole = resolved(recipe, SECTIONS)
    assert whole.method_settings["experts"] == 7 and whole.method_settings["scale"] is None
    assert whole.plan["clip"] is None and whole.plan["epochs"] == Plan().epochs and whole.front_end["frames"] == 500
    assert from_dict(tomllib.loads(to_toml(whole)), SECTIONS) == whole
    assert build(Plan, whole.plan) == Plan(clip=None)
    assert build(Mixture, whole.method_settings) == Mixture(scale=None, prefix=None)


def test_a_value_that_no_recipe_holds_is_refused_when_writing():
    with pytest.raises(UsageError, match="a recipe cannot hold"):
        to_toml(replace(BASE, head={"size": {1, 2}}))


# dataclasses and digests


def test_build_checks_keys_types_and_what_the_dataclass_refuses():
    assert build(Mixture, {"experts": 2, "sites": ["mlp"]}) == Mixture(experts=2, sites=("mlp",))
    with pytest.raises(UsageError, match="settings.expert is not a setting; did you mean experts"):
        build(Mixture, {"expert": 2})
    with pytest.raises(UsageError, match="lora.experts=True: expected a whole number"):
        build(Mixture, {"experts": True}, "lora")
    with pytest.raises(UsageError, match="settings: experts must be at least 1"):
        build(Mixture, {"experts": 0})
    with pytest.raises(UsageError, match="^epochs=0: expected"):
        build(Plan, {"epochs": 0})
    with pytest.raises(UsageError, match="front_end.sample_rate_hz is missing"):
        build(FrontEnd, {"frames": 3}, "front_end")


def test_the_digest_follows_what_is_computed_and_not_where_the_table_lies():
    same = [replace(BASE, notes="n"), replace(BASE, paper="p"), replace(BASE, data=DataSettings(manifest="/a.csv"))]
    assert {digest(recipe) for recipe in same} == {digest(BASE)}
    other = [changed(text) for text in ("experts=8", "plan.lr=1e-3", "data.cv=fold", "seeds=1", "backbone=b")]
    other += [changed("lr_grid=0.1"), changed("weight_decay_grid=0.1"), changed("refit=true")]
    assert len({digest(recipe) for recipe in [BASE, *other]}) == 9
