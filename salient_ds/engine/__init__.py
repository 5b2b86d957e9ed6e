"""The engine that decides ranks while DeepSpeed trains."""
