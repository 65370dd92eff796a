"""From documents to padded batches of token ids."""
