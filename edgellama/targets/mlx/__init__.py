"""Target `mlx`: a directory for MLX, MLX Swift and FoundationModels' MLXLanguageModel."""
