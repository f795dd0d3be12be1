"""From text to token shards. Runs offline, before training; nothing here is imported by a training run."""
