"""How command lines are read: every way to be right, and every way to be wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgstorage.cli.grammar import Call, Help, UsageError, Version, parse
from imgstorage.cli.verbs import VERBS
from imgstorage.core.errors import EXIT_USAGE

WORDS = sorted({word for verb in VERBS for word in verb.words})


def call(line: str) -> Call:
    found = parse("imgstorage", VERBS, line.split())
    assert isinstance(found, Call)
    return found


def wrong(line: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        parse("imgstorage", VERBS, line.split())
    assert caught.value.exit_status == EXIT_USAGE
    return caught.value


def test_the_guides_commands_are_read_as_printed():
    found = call("add host storagemap nas-0-0 tank vol1 compute-0-3 10")
    assert found.verb.name == "add host storagemap"
    names = ("NAS", "ZPOOL", "VOLUME", "HOST", "SIZE")
    assert [found.one(name) for name in names] == ["nas-0-0", "tank", "vol1", "compute-0-3", "10"]
    assert found.text("remotepool") is None
    assert found.text("img_sync") is None
    assert call("remove host storagemap nas-0-0 vol1").one("VOLUME") == "vol1"
    assert call("remove host storageimg nas-0-0 tank vol1").one("ZPOOL") == "tank"
    assert call("list host storagemap nas-0-0").many("NAS") == ("nas-0-0",)
    assert call("list host storagedev compute-0-3").many("HOST") == ("compute-0-3",)


@pytest.mark.parametrize("line", ["wait=yes nas-0-0 vol1", "nas-0-0 wait=yes vol1", "nas-0-0 vol1 wait=yes"])
def test_parameters_stand_anywhere_after_the_words(line):
    found = call(f"remove host storagemap {line}")
    assert (found.one("NAS"), found.one("VOLUME"), found.yes("wait", False)) == ("nas-0-0", "vol1", True)


@pytest.mark.parametrize(("value", "truth"), [("yes", True), ("TRUE", True), ("1", True), ("no", False), ("0", False)])
def test_truth_is_written_as_in_rocks(value, truth):
    assert call(f"remove host storagemap n v force={value}").yes("force", not truth) is truth


def test_words_may_be_cut_short_while_they_mean_one_command():
    assert call("li h storagem nas-0-0").verb.name == "list host storagemap"
    assert call("l h").verb.name == "list host"
    assert call("show op op-abcdefghijklm").verb.name == "show operation"
    error = wrong("list host storage nas-0-0")
    assert "storagemap, storagedev, storageimg" in error.message
    assert len(error.choices) == 3
    assert "show, sandbox" in wrong("s").message


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "no command given"),
        ("list", "beginning of several commands"),
        ("list hosts", "is not a command"),
        ("frobnicate", "is not a command"),
        ("list host nas-0-0", "one argument too many"),
        ("remove host storagemap", "NAS is missing"),
        ("remove host storagemap nas-0-0", "VOLUME is missing"),
        ("remove host storagemap nas-0-0 vol1 x", "'x' is one argument too many"),
        ("add host storagemap nas-0-0 tank vol1 compute-0-3", "SIZE is missing"),
        ("remove host storagemap nas-0-0 vol1 wait=perhaps", "neither yes nor no"),
        ("remove host storagemap nas-0-0 vol1 wait=", "neither yes nor no"),
        ("remove host storagemap nas-0-0 vol1 wiat=no", "there is no parameter wiat=; there is zpool=, force=, wait="),
        ("remove host storagemap nas-0-0 vol1 WAIT=no", "there is no parameter WAIT="),
        ("remove host storageimg nas-0-0 tank vol1 wait=no", "there is none"),
        ("remove host storagemap nas-0-0 vol1 pool=a zpool=b", "given twice"),
        ("list host storagemap nas-0-0 output-format=xml", "none of text, json"),
        ("dump host storageimg nas-0-0 tank vol1", "file= is missing"),
        ("completion fish", "'fish' is none of bash, zsh"),
        ("list host --frob", "'--frob' is not an option"),
        ("list host -C", "needs a file"),
        ("list host --config=", "needs a file"),
        ("list host \udcff", "argument 3 is not valid UTF-8"),
    ],
)
def test_what_is_wrong_is_said(line, says):
    error = wrong(line)
    assert says in error.message
    assert error.hint or error.choices


def test_a_usage_error_names_the_command_and_shows_its_usage():
    error = wrong("remove host storagemap nas-0-0")
    assert error.message.startswith("remove host storagemap: ")
    assert error.usage == (
        "imgstorage remove host storagemap NAS VOLUME [zpool=POOL] [force=yes|no] [wait=yes|no]"
    )  # fmt: skip
    assert error.hint == "imgstorage remove host storagemap help"
    assert wrong("add host").choices == (
        "add host storagemap NAS ZPOOL VOLUME HOST SIZE",
        "add host storageimg NAS ZPOOL VOLUME SIZE|file=IMAGE",
    )


def test_help_in_all_its_places():
    def asked(line: str) -> Help:
        found = parse("rocks", VERBS, line.split())
        assert isinstance(found, Help)
        return found

    assert asked("help") == asked("--help") == asked("-h") == Help()
    assert asked("list host help") == Help(words=("list", "host"))
    assert asked("help list host").words == ("list", "host")
    one = asked("list host storagemap help").verb
    assert one is not None
    assert one.name == "list host storagemap"
    assert asked("remove host storagemap nas-0-0 --help").verb
    assert isinstance(parse("rocks", VERBS, ["--version"]), Version)


def test_a_volume_may_be_called_help():
    assert call("remove host storagemap nas-0-0 help").one("VOLUME") == "help"


def test_options_stand_anywhere():
    found = call("-C a.conf list --json host --debug")
    assert (found.options.config, found.options.json, found.options.debug) == ("a.conf", True, True)
    assert call("list host --config=b.conf").options.config == "b.conf"


def test_what_sandbox_exec_runs_is_not_read():
    found = call("sandbox exec dir=/s compute-0-0 sh -c a=b --debug help")
    assert found.one("HOST") == "compute-0-0"
    assert found.many("COMMAND") == ("sh", "-c", "a=b", "--debug", "help")
    assert found.text("dir") == "/s"
    assert not found.options.debug
    assert call("sandbox exec compute-0-0 -- ls").many("COMMAND") == ("ls",)


def test_two_dashes_end_options_and_parameters():
    assert call("remove host storagemap -- nas-0-0 a=b").one("VOLUME") == "a=b"


@given(
    st.lists(st.one_of(st.sampled_from([*WORDS, "help", "--json", "wait=yes", "-C", "--", "x"]), st.text()), max_size=9)
)
def test_any_line_is_a_call_help_or_a_usage_error(argv):
    try:
        found = parse("imgstorage", VERBS, argv)
    except UsageError as error:
        assert error.message
        return
    if isinstance(found, Call):
        given_count = sum(len(values) for values in found.arguments.values())
        assert given_count + len(found.parameters) <= len(argv)
        for argument in found.verb.arguments:
            assert found.one(argument.name) or argument.many or argument.optional or "" in argv


@given(st.sampled_from([verb for verb in VERBS if not verb.hidden]), st.data())
def test_a_shortened_word_never_means_another_command(verb, data):
    words = [word[: data.draw(st.integers(1, len(word)))] for word in verb.words]
    try:
        found = parse("imgstorage", VERBS, [*words, "--help"])
    except UsageError as error:
        assert "may mean" in error.message
        return
    assert isinstance(found, Help)
    assert found.words == verb.words
