"""What a policy does to a model's answers: questions with known answers, asked of dense and compiled models."""
