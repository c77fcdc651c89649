"""drivers/net"""
