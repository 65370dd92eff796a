"""Language models with an SAE spliced in: finding, checking, splicing and measuring the loss."""
