"""What servers of other makes, vLLM and SGLang, say about their caches: read, mapped to our keys, followed."""
