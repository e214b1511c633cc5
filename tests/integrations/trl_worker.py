"""Train with the drop-in on whatever ranks there are; run from test_trl_two_ranks.py, alone or by ``torchrun``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import conftest  # noqa: E402
import test_trl_drop_in as host  # noqa: E402
import torch  # noqa: E402

from tempo_fast.integrations import trl as drop_in  # noqa: E402

PAIRS = 4  # of a step, over all ranks


def main(folder: Path, ranks: int) -> None:
    """Writes the logged losses and the whole movement of each case to ``folder/ranks.pt``."""
    found = {}
    for case in ("lora", "full"):
        lora = case == "lora"
        model = conftest._make_model()
        model = conftest._with_adapter(model, init_lora_weights=True) if lora else model
        trainer = host.build(
            drop_in.DPOTrainer, folder / f"{case}{ranks}", model, ref_model=None if lora else conftest._make_model(),
            per_device_train_batch_size=PAIRS // ranks, learning_rate=0.02 if lora else 0.005, max_steps=6,
        )
        assert trainer.args.world_size == ranks
        start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.train()
        losses = torch.tensor([step["loss"] for step in trainer.state.log_history[:-1]], dtype=torch.float64)
        found[case] = (losses, host.movement(trainer.model, start))
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(found, folder / f"{ranks}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
