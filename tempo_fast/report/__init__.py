"""The page of a run: one self-contained HTML file, and the same figures as text for the terminal."""

from __future__ import annotations

from pathlib import Path

from tempo_fast.config import RunConfig


def build_report(run_dir: Path, config: RunConfig) -> Path:
    """Write ``report.html`` from the files of a run; parts that are not there yet are named as such.

    Args:
        run_dir: a run's folder.
        config: its configuration (how many film strips, and of how many frames).

    Returns:
        The page. It asks nothing of the network: style, charts and pictures are inside.
    """
    from tempo_fast.files import write_atomic
    from tempo_fast.report.load import load_run
    from tempo_fast.report.page import render

    html = render(load_run(Path(run_dir)), config)
    path = Path(run_dir) / "report.html"
    write_atomic(path, lambda f: f.write(html.encode()))
    return path


__all__ = ["build_report"]
