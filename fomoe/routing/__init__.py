"""Router scores to experts and weights; pure."""
