"""One SAE on several ranks (processes of torch.distributed): what its parts of a batch must agree on."""
