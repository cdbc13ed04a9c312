"""Samplers: what they take and give, and the engines behind them."""
