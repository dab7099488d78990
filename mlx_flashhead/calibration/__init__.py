"""What a model's own hidden states tell about how its head is to be read.

Samples states, and draws from them the number of probes and the tails' level.
"""

from mlx_flashhead.calibration.probes import (
    CONFIDENCE,
    ProbeChoice,
    choose_probes,
    judge_probes,
    probes_needed,
)
from mlx_flashhead.calibration.states import (
    DEFAULT_POSITIONS,
    NUM_FOLDS,
    CalibrationSet,
    sample_states,
)
from mlx_flashhead.calibration.tails import tail_level

__all__ = [
    "CONFIDENCE",
    "DEFAULT_POSITIONS",
    "NUM_FOLDS",
    "CalibrationSet",
    "ProbeChoice",
    "choose_probes",
    "judge_probes",
    "probes_needed",
    "sample_states",
    "tail_level",
]
