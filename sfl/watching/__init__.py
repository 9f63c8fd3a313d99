"""What a daemon shows of itself while it runs: figures for Prometheus, health, and reports for `sfl status`. No torch."""
