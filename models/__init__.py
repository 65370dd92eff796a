"""Everything that involves a Hugging Face model: finding, loading, running, hooking, tokenizing, measuring losses."""
