"""The training objectives; every loss returns one value per sample."""
