"""Bring the series up to date with the plugin: ``python patches/refresh.py`` after its modules have
changed.

Applies the patches one by one in a scratch tree, puts the plugin's modules as they are now where
the series adds them (:data:`series.ADDED`), and exports the series again. What patches do to ASDL's
own files stays as it is; to change that, edit the commits in a tree of your own (``--keep FOLDER``,
``git rebase``) and export from there (``--from FOLDER``).
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import series


def bring_up_to_date(tree: Path, which: int) -> None:
    """Add the plugin's modules that belong to a patch to its commit, which is the last one. Sets
    the author, too.
    """
    for module in series.added_by(which):
        (tree / series.NATIVE).mkdir(exist_ok=True)
        shutil.copyfile(series.PLUGIN / f"{module}.py", tree / series.NATIVE / f"{module}.py")
    series.git(tree, "add", "--all")
    series.git(tree, "commit", "--quiet", "--amend", "--no-edit", "--allow-empty", "--reset-author")


def rebuild(tree: Path, patches: list[Path]) -> None:
    """Make a tree with one commit for each patch, with the plugin's modules as they are now."""
    series.make_tree(tree)
    for patch in patches:
        # The modules are left out, so that it does not matter which ones there were.
        series.git(
            tree,
            "am",
            "--quiet",
            "--keep-cr",
            "--committer-date-is-author-date",
            f"--exclude={series.NATIVE}/*",
            "--include=*",
            str(patch),
        )
        bring_up_to_date(tree, series.number(patch))


def export(tree: Path, folder: Path) -> list[Path]:
    """Write the commits of a tree as patches, with the least context that ``git apply`` needs."""
    for old in folder.glob("[0-9][0-9][0-9][0-9]-*.patch"):
        old.unlink()
    series.git(
        tree,
        "format-patch",
        "--quiet",
        "--unified=1",
        "--zero-commit",
        "--no-signature",
        "--no-stat",
        "--no-renames",
        "--diff-algorithm=histogram",
        "--filename-max-length=100",
        "--output-directory",
        str(folder),
        "stock",
    )
    return sorted(folder.glob("[0-9][0-9][0-9][0-9]-*.patch"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", type=Path, help="leave the scratch tree in this folder")
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        help="take the commits of this tree instead of the patches",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        patches = series.patches()
        if options.source is not None:
            exported = Path(scratch) / "exported"
            exported.mkdir()
            patches = export(options.source.resolve(), exported)
        tree = Path(scratch) / "tree"
        rebuild(tree, patches)
        for patch in export(tree, series.HERE):
            print(patch.name, f"{patch.stat().st_size:,} bytes")
        if options.keep is not None:
            shutil.copytree(tree, options.keep)


if __name__ == "__main__":
    main()
