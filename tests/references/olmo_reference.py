"""Runs inside the reference's own environment: ai2-olmo's trainer, model, loader, optimizer and scheduler on one CPU process.

    python olmo_reference.py JOB.json

The job names OLMo configuration files, first weights under OLMo's names, and tokens; the results go beside it:
curves.json ({variant: {loss, grad_norm, lr}}), facts.json (logits, first deviations, order, learning rates) and each
variant's unsharded checkpoint at half of the run. tests/references/olmo_parity.py starts it; nothing here knows olmo_train.
"""

import json
import math
import os
import sys
from pathlib import Path

os.environ |= {"MASTER_ADDR": "localhost", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "FS_LOCAL_RANK": "0"}

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from olmo.config import CheckpointType, SchedulerConfig, TrainConfig
from olmo.data import build_train_dataloader
from olmo.model import OLMo
from olmo.optim import build_optimizer, build_scheduler
from olmo.train import Trainer
from torch.nn.parallel import DistributedDataParallel

METRICS = {"loss": "train/CrossEntropyLoss", "grad_norm": "optim/total_grad_norm"}


def load_config(file: Path) -> TrainConfig:
    config = TrainConfig.load(file)
    config.device_train_batch_size = config.global_train_batch_size
    config.device_train_grad_accum = config.global_train_batch_size // config.device_train_microbatch_size
    return config


def load_model(config: TrainConfig, weights: Path) -> OLMo:
    model = OLMo(config.model, init_params=False)
    model.load_state_dict(safetensors.torch.load_file(weights))
    return model


def run(config: TrainConfig, model: OLMo, keep: Path) -> dict[str, list[float]]:
    """OLMo's own Trainer.fit; records what train_step returns, and keeps a checkpoint at half of the run."""
    wrapped = DistributedDataParallel(model)
    trainer = Trainer(
        cfg=config,
        model=model,
        dist_model=wrapped,
        optim=build_optimizer(config, wrapped),
        scheduler=build_scheduler(config),
        train_loader=build_train_dataloader(config),
        device=torch.device("cpu"),
        evaluators=[],
        epoch=0,
    )
    curves = {"loss": [], "grad_norm": [], "lr": []}
    step = trainer.train_step

    def noted_step(batch, reduce_global_loss=True):
        metrics = step(batch, reduce_global_loss)
        for name, key in METRICS.items():
            curves[name].append(metrics[key])
        curves["lr"].append(trainer.optim.param_groups[0]["lr"])
        if trainer.global_step == trainer.max_steps // 2:
            folder, _ = trainer.save_checkpoint(CheckpointType.unsharded)
            Path(folder).rename(keep)
        return metrics

    trainer.train_step = noted_step
    with trainer:
        trainer.fit()
    return curves


def deviations(config: TrainConfig) -> dict[str, float]:
    """Standard deviation of each weight as OLMo first draws it."""
    torch.manual_seed(config.seed)
    return {name: value.std().item() for name, value in OLMo(config.model).named_parameters() if value.ndim > 1}


def learning_rates(job: dict) -> list[list[float]]:
    rates = []
    for case in job["schedules"]:
        scheduler = build_scheduler(TrainConfig.new(), SchedulerConfig.new(**case["scheduler"]))
        rates.append([scheduler.get_lr(case["peak"], step, case["max_steps"]) for step in case["steps"]])
    return rates


def main(job_file: Path) -> None:
    job, folder = json.loads(job_file.read_text()), job_file.parent
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    torch.set_num_threads(1)
    torch.cuda.get_rng_state = lambda *_: torch.zeros(1, dtype=torch.uint8)  # saved with a checkpoint, absent on a CPU
    curves, facts = {}, {"logits": {}, "deviations": {}, "order": {}}
    for name in job["variants"]:
        config = load_config(folder / name / "olmo.yaml")
        model = load_model(config, folder / name / "first.safetensors")
        with torch.no_grad():
            logits = model.eval()(torch.tensor(job["tokens"])).logits
        safetensors.torch.save_file({"logits": logits.contiguous()}, folder / name / "logits.safetensors")
        facts["deviations"][name] = deviations(config)
        curves[name] = run(config, model, folder / name / f"step{math.floor(config.max_duration / 2)}-unsharded")
        dataset = build_train_dataloader(config).dataset
        facts["order"][name] = [int(i) for i in np.array(dataset.get_global_indices())[:16]]
    facts["learning_rates"] = learning_rates(job)
    (folder / "curves.json").write_text(json.dumps(curves))
    (folder / "facts.json").write_text(json.dumps(facts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
