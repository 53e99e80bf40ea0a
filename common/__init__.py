"""What every lesson needs and no paper is about: data, pictures, runs, checkpoints."""
