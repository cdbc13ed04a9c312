"""Samplers and the engines behind them."""
