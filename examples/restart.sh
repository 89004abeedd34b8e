#!/bin/sh
# Can the server be restarted while its TIME_WAIT is there? In a private network, judged at the end.
exec "${TIMEWAIT:-timewait}" exec -- sh -ec '
    serve() { python3 -m http.server --bind 127.0.0.1 9090 & until get; do sleep 0.1; done; }
    get() { python3 -c "import urllib.request as u; u.urlopen(\"http://127.0.0.1:9090\").read()"; }
    serve 2> /dev/null; get; kill $!; wait $! || true
    serve 2> /dev/null; echo "restarted"; kill $!
'
