"""Write a model in a GGUF file, whose weights have few bits, as a folder in transformers' format with fp32 weights.

`olmo-train convert import-hf` reads that folder. Needs the packages transformers and gguf.

    python launch/dequantize.py SmolLM2-135M-Instruct.Q4_1.gguf data/smollm2
"""

import argparse
import os
import shutil
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"  # three progress bars for some seconds
    import torch
    import transformers

    source = {"pretrained_model_name_or_path": options.file.parent, "gguf_file": options.file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    model.config.__dict__.pop("quantization_config", None)  # a model that was quantized is not saved; its weights are fp32 now
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    unfinished = options.output.with_name(options.output.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    plain.save_pretrained(unfinished)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(unfinished)
    shutil.rmtree(options.output, ignore_errors=True)
    os.replace(unfinished, options.output)
    print(f"{options.output}: {sum(p.numel() for p in plain.parameters()):,} parameters")


if __name__ == "__main__":
    main()
