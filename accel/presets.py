"""Named acceleration settings, measured in closed loop on the tiny models (see README, "What it does to a video")."""

from __future__ import annotations

from .correct import CorrectionConfig
from .engine import Acceleration, HistoryGuidedConfig, SchedulerConfig
from .policy import TriModalConfig

BALANCED = Acceleration(scheduler=SchedulerConfig())
FAST = Acceleration(scheduler=SchedulerConfig(TriModalConfig(0.0, 9.0, decay=1.0, max_skip=9), reach=3.0))
HISTORY_GUIDED = Acceleration(history_guided=HistoryGuidedConfig(), correction=CorrectionConfig())

PRESETS = {"balanced": BALANCED, "fast": FAST, "history-guided": HISTORY_GUIDED}
