"""Flags over environment over configuration file over defaults, each complaint naming its source."""

import tomllib

import pytest

from vstar_engine.commands import generate, video_options
from vstar_engine.commands.option_sources import Parser, layered, to_toml
from vstar_engine.sampling.tar import tables


def settings(argv=(), environ=None, toml=None, tmp_path=None):
    parser = Parser(allow_abbrev=False)
    generate.add_options(parser)
    if toml is not None:
        (tmp_path / "v.toml").write_text(toml)
        argv = ["--config", str(tmp_path / "v.toml"), *argv]
    return layered(parser, argv, environ or {})


def test_each_layer_covers_the_one_below(tmp_path):
    toml = 'steps = 5\nguidance = 3.5\neta = 0.5\nstates = ["a", "b"]\nbatch-guidance = false\n'
    args = settings(["--steps", "7"], {"VSTAR_STEPS": "6", "VSTAR_GUIDANCE": "4"}, toml, tmp_path)
    assert (args.steps, args.guidance, args.eta, args.frames) == (7, 4.0, 0.5, 64)
    assert args.states == ["a", "b"]
    assert args.batch_guidance is False


@pytest.mark.parametrize(
    ("flags", "steps", "guidance", "regularised"),
    [
        ([], 25, 12.0, 14),
        (["--steps", "50"], 50, 12.0, 14),
        (["--steps", "50", "--until", "56%"], 50, 12.0, 28),
        (["--fast", "few-step"], 4, 1.0, 2),
        (["--fast", "few-step", "--until", "3"], 4, 1.0, 4),
        (["--fast", "few-step", "--steps", "8"], 8, 1.0, 4),
        (["--fast", "few-step", "--steps", "25", "--guidance", "12"], 25, 12.0, 14),
        (["--fast", "step-cache,guidance-interval"], 25, 12.0, 14),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_defaults_that_depend_on_other_settings(flags, steps, guidance, regularised):
    """Without few-step sampling TAR's default counts steps, as published, whatever their number."""
    args = settings(flags)
    assert (args.steps, args.guidance) == (steps, guidance)
    rows = tables(video_options.tar_from(args), 4, 3, args.steps)
    assert rows.any(-1).any(-1).flatten().tolist() == [True] * regularised + [False] * (steps - regularised)
    assert f"steps = {steps}\nguidance = {guidance}" in to_toml(args)
    assert "settle" not in to_toml(args)


def test_flags_replace_lists_instead_of_adding_to_them(tmp_path):
    args = settings(["--states", "x", "--states", "y", "z"], {"VSTAR_SIGMA": "0=2\n1=3"}, 'states = ["a"]', tmp_path)
    assert args.states == ["x", "y", "z"]
    assert args.sigma == ["0=2", "1=3"]


def test_the_configuration_file_can_come_from_the_environment(tmp_path):
    (tmp_path / "c.toml").write_text("steps = 3")
    assert settings(environ={"VSTAR_CONFIG": str(tmp_path / "c.toml")}).steps == 3


def test_printed_settings_read_back_the_same(tmp_path):
    args = settings(["--sigma", "0=2", "--size", "96x128", "--states", 'a "b"', "ü 🚀", "--until", "50%", "--gif"])
    printed = to_toml(args)
    tomllib.loads(printed)
    again = settings(toml=printed, tmp_path=tmp_path)
    skipped = ("config", "print_config")
    assert {k: v for k, v in vars(args).items() if k not in skipped} == {
        k: v for k, v in vars(again).items() if k not in skipped
    }


@pytest.mark.parametrize(
    ("toml", "environ", "complaint"),
    [
        ("colour = 1", {}, "unknown setting 'colour'"),
        ("steps = 'many'", {}, "v.toml: steps must be a whole number, got 'many'"),
        ("steps = 2.5", {}, "v.toml: steps must be a whole number, got 2.5"),
        ("fps = 'fast'", {}, "v.toml: fps must be a number, got 'fast'"),
        ("steps = [1]", {}, "single value"),
        ("states = 'one'", {}, "must be a list"),
        ("gif = 'maybe'", {}, "true or false"),
        ("steps = ", {}, "cannot read the configuration"),
        ("size = '96'", {}, "HEIGHTxWIDTH"),
        ("", {"VSTAR_STEPS": "x"}, "VSTAR_STEPS"),
        ("", {"VSTAR_BATCH_GUIDANCE": "perhaps"}, "VSTAR_BATCH_GUIDANCE must be true or false"),
    ],
)
def test_bad_values_name_their_source(tmp_path, toml, environ, complaint):
    with pytest.raises(ValueError, match=complaint):
        settings(environ=environ, toml=toml, tmp_path=tmp_path)


def test_whole_numbers_as_other_programs_write_them(tmp_path):
    args = settings(toml="steps = 16.0\nseed = '7'\nfps = 8", tmp_path=tmp_path)
    assert (args.steps, args.seed, args.fps) == (16, 7, 8.0)


def test_a_configuration_file_that_is_not_there():
    with pytest.raises(ValueError, match="cannot read the configuration nowhere"):
        settings(["--config", "nowhere.toml"])


def test_an_empty_variable_is_unset():
    assert settings([], {"VSTAR_STEPS": "", "VSTAR_OUT": ""}).steps == settings().steps


def test_what_kubernetes_sets_for_a_service_is_named_and_flags_win():
    environ = {"VSTAR_STEPS": "tcp://10.43.1.39:8000"}
    with pytest.raises(
        ValueError, match="which Kubernetes sets for a Service of the name vstar; set enableServiceLinks: false"
    ):
        settings([], environ)
    assert settings(["--steps", "25"], environ).steps == 25  # though 25 is the default


def test_a_file_is_utf8_with_or_without_a_mark(tmp_path):
    (tmp_path / "m.toml").write_bytes("\ufeffnegative = '雪'\r\n".encode())
    assert settings(["--config", str(tmp_path / "m.toml")]).negative == "雪"


@pytest.mark.parametrize("argv", [["--states", "a", "b"], ["a prompt"]])
def test_what_the_line_shows_replaces_what_a_file_shows(argv, tmp_path):
    args = settings(argv, {}, 'synopsis = "s.txt"\n', tmp_path)
    assert args.synopsis is None
