"""From text to token shards to batches: tokenizer, prepare, shards, order, loader."""
