from czsl_heads.adapters.bottleneck import add_bottlenecks as add_bottlenecks
