"""check this machine for problems that would stop a run"""

from __future__ import annotations

import argparse

from olmo_train.commands.common import add_config_arguments, split_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser, nargs="*")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(arguments: argparse.Namespace) -> int:
    import json

    from olmo_train import config
    from olmo_train.tools import doctor
    from olmo_train.train_config import TrainConfig

    findings = doctor.examine(config.load(TrainConfig, *split_config(arguments.config)) if arguments.config else None)
    if arguments.json:
        print(json.dumps([vars(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            print(f"{finding.status:<8}{finding.check:<14}{finding.finding}")
            if finding.remedy:
                print(f"{'':<22}-> {finding.remedy}")
    return 1 if any(finding.status == "problem" for finding in findings) else 0
