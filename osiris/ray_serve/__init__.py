"""The sidecar on Ray Serve: its models in replicas on several machines.

    python -m osiris.ray_serve --phi3-min 2      # one machine
    serve deploy deploy/ray/serve.yaml           # a cluster

`app` builds the application, `replica` is the deployment of a model, `ingress` that of the sidecar,
`handles` its way to the models, and `launch` starts Ray on one machine. Importing this package does
not import Ray.
"""
