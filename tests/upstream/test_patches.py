"""The patch series for ASDL: it applies, it is up to date with the plugin, and it is what ``git
am`` takes.

What the patched ASDL does is tested by ``make upstream`` (``patches/check.py``).
"""

import re
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "patches"))
import refresh  # noqa: E402
import series  # noqa: E402

AUTHOR = "{GIT_AUTHOR_NAME} <{GIT_AUTHOR_EMAIL}>".format_map(series.ENVIRONMENT)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        metadata.version("asdfghjkl") != series.VERSION,
        reason=f"the patches are for asdfghjkl {series.VERSION}",
    ),
]

SUBJECTS = [
    "core",
    "core",
    "utils",
    "fisher",
    "natural_gradient",
    "operations",
    "natural_gradient",
    "test",
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The stock wheel with the series applied, one commit a patch."""
    tree = tmp_path_factory.mktemp("upstream") / "tree"
    series.make_tree(tree)
    for patch in series.patches():
        series.apply(tree, patch)
    return tree


def test_there_is_a_patch_for_every_subject():
    assert [series.number(patch) for patch in series.patches()] == list(range(1, len(SUBJECTS) + 1))
    for patch, subject in zip(series.patches(), SUBJECTS, strict=True):
        text = patch.read_text(encoding="utf-8")
        assert re.search(rf"^Subject: \[PATCH \d/8\] {subject}: ", text, re.MULTILINE), patch.name
        assert f"\nFrom: {AUTHOR}\n" in text, patch.name
        message = text.split("\n---\n")[0]
        for part in ("What was wrong.", "How to see it.", "What changes."):
            assert part in message or patch.name.startswith("0008"), (patch.name, part)


def test_every_patch_brings_tests(tree):
    for number in range(1, len(SUBJECTS) + 1):
        commit = f"main~{len(SUBJECTS) - number}"
        names = series.git(tree, "show", "--name-only", "--format=", commit).split()
        assert any(name.startswith("test/") for name in names), number
        assert all(name.startswith(("asdl/", "test/")) for name in names), names


def test_added_modules_are_the_plugins_byte_for_byte(tree):
    found = {file.stem for file in (tree / series.NATIVE).glob("*.py")}
    assert found == {name for number in range(1, 9) for name in series.added_by(number)}
    for name in sorted(found):
        native, plugin = tree / series.NATIVE / f"{name}.py", series.PLUGIN / f"{name}.py"
        assert native.read_bytes() == plugin.read_bytes(), (
            f"{name}.py has changed: run python patches/refresh.py"
        )


def test_no_later_patch_changes_what_an_earlier_one_added(tree):
    for name in sorted(file.name for file in (tree / series.NATIVE).glob("*.py")):
        commits = series.git(tree, "log", "--format=%h", "--", str(series.NATIVE / name)).split()
        assert len(commits) == 1, name


def test_patches_are_exported_as_refresh_does(tree, tmp_path):
    """Nothing was edited by hand: the same commits give the same files."""
    for exported, patch in zip(refresh.export(tree, tmp_path), series.patches(), strict=True):
        assert exported.name == patch.name
        assert exported.read_text(encoding="utf-8") == patch.read_text(encoding="utf-8"), patch.name


def test_nothing_depends_on_how_git_is_configured(tmp_path, monkeypatch):
    """Nor on what git sets for a hook or an alias of an outer repository."""
    settings = {
        "commit.gpgsign": "true",
        "tag.gpgsign": "true",
        "core.autocrlf": "true",
        "core.hooksPath": "/nowhere",
        "user.useConfigOnly": "true",
        "diff.noprefix": "true",
        "format.signOff": "true",
    }
    monkeypatch.setenv("GIT_CONFIG_COUNT", str(len(settings)))
    for i, (key, value) in enumerate(settings.items()):
        monkeypatch.setenv(f"GIT_CONFIG_KEY_{i}", key)
        monkeypatch.setenv(f"GIT_CONFIG_VALUE_{i}", value)
    for name in (
        "GIT_DIR",
        "GIT_WORK_TREE",
        "GIT_INDEX_FILE",
        "GIT_OBJECT_DIRECTORY",
        "GIT_COMMON_DIR",
    ):
        monkeypatch.setenv(name, str(tmp_path / "nowhere"))
    tree = tmp_path / "with space" / "tree"
    refresh.rebuild(tree, series.patches()[:2])
    for exported, patch in zip(refresh.export(tree, tmp_path), series.patches(), strict=False):
        assert exported.name == patch.name
    assert (
        series.git(tree, "log", "--format=%an").split()
        == [series.ENVIRONMENT["GIT_AUTHOR_NAME"]] * 3
    )


def test_context_that_differs_is_an_error(tmp_path):
    """Without fuzz: a patch does not apply where the lines around a change are others."""
    tree = tmp_path / "tree"
    series.make_tree(tree)
    core = tree / "asdl" / "core.py"
    line = "        if not cxt.is_operation_registered(model):\n"
    assert f"\n {line}" in series.patches()[1].read_text(), (
        "the line is context of the second patch"
    )
    core.write_text(core.read_text().replace(line, line.replace("model", "(model)")))
    series.git(tree, "commit", "--quiet", "--all", "--message", "other context")
    first, second = series.patches()[:2]
    series.apply(tree, first)
    with pytest.raises(RuntimeError, match="patch does not apply"):
        series.apply(tree, second)


def test_a_module_that_has_changed_is_noticed_and_refreshed(tree, tmp_path, monkeypatch):
    plugin = tmp_path / "plugin"
    plugin.mkdir()
    for file in series.PLUGIN.glob("*.py"):
        (plugin / file.name).write_bytes(file.read_bytes())
    (plugin / "rules.py").write_text((plugin / "rules.py").read_text() + "\n# changed\n")
    monkeypatch.setattr(series, "PLUGIN", plugin)
    refreshed = tmp_path / "refreshed"
    refresh.rebuild(refreshed, series.patches())
    assert (refreshed / series.NATIVE / "rules.py").read_text().endswith("# changed\n")
    assert "# changed" not in (tree / series.NATIVE / "rules.py").read_text()
    log = "--format=%s"
    assert series.git(refreshed, "log", log) == series.git(tree, "log", log)


def test_patched_asdl_is_used_as_it_is(tree, tmp_path):
    """The plugin patches nothing at run time; one registry, one set of classes; a partly patched
    one is refused.
    """
    code = """
        import sys, asdl

        for name in ("fisher_maker", "grad_maker", "_version", "nvtx"):
            __import__(f"asdl.weight_sharing.{name}")
        snapshot = {
            m: dict(vars(module)) for m, module in sys.modules.items() if m.split(".")[0] == "asdl"
        }
        inits = [
            asdl.KfacGradientMaker.__init__,
            asdl.FisherConfig.__init__,
            asdl.get_fisher_maker.__code__,
        ]
        import asdl_ws_plugin
        from asdl_ws_plugin.weight_sharing.plan import Plan
        import asdl_ws_plugin.weight_sharing.registry as registry

        assert Plan is asdl.weight_sharing.plan.Plan and registry is asdl.weight_sharing.registry
        assert asdl_ws_plugin.WeightSharingLinear is asdl.WeightSharingLinear
        assert asdl_ws_plugin.register_operation is asdl.register_operation
        asdl_ws_plugin.unregister()
        asdl_ws_plugin.register()
        assert [
            asdl.KfacGradientMaker.__init__,
            asdl.FisherConfig.__init__,
            asdl.get_fisher_maker.__code__,
        ] == inits
        for name, before in snapshot.items():
            now = vars(sys.modules[name])
            assert all(now[key] is value for key, value in before.items()), name
    """
    environment = {"PYTHONPATH": f"{tree}:{ROOT}", "PATH": "/usr/bin:/bin"}

    def run(code):
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env=environment,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )

    done = run(code)
    assert done.returncode == 0, done.stderr
    partly = tmp_path / "partly"
    series.make_tree(partly)
    for patch in series.patches()[:3]:
        series.apply(partly, patch)
    environment["PYTHONPATH"] = f"{partly}:{ROOT}"
    done = run("import asdl_ws_plugin")
    assert (
        done.returncode == 1
        and "ImportError: This ASDL carries a part of asdl_ws_plugin" in done.stderr
    )
