"""Text in, batches out: tokenizers, the embedded corpus, token shards and the training loader."""
