"""What several algorithms share: advantages, log-ratios of stored steps, denoising errors, preference losses."""
