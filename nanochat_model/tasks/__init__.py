"""Tasks of fine-tuning and chat evaluation: their files, their problems, and what makes an answer right."""
