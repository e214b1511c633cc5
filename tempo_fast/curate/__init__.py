"""Videos to clips: shots, groups of shots that look alike, keyframes; and which videos are usable at all."""

from __future__ import annotations

from tempo_fast.curate.folder import CurateJob, CurateResult, curate_folder
from tempo_fast.curate.sources import list_videos
from tempo_fast.curate.video import Unusable, curate_video

__all__ = ["CurateJob", "CurateResult", "Unusable", "curate_folder", "curate_video", "list_videos"]
