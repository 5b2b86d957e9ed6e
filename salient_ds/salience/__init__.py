"""Salience statistics and rank selection as pure functions on tensors."""
