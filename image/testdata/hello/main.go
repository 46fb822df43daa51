// Hello is a service of somebody else's: a program that knows nothing of the
// cluster, for the tests of images.
package main

import (
	"flag"
	"fmt"
	"net/http"
	"os"
)

func main() {
	listen := flag.String("listen", ":8082", "`address`")
	flag.Parse()
	content := os.Getenv("CLONECLUSTER_CONTENT")
	http.HandleFunc("GET /hello", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, "hello from %s\n", os.Getenv("CLONECLUSTER_NODE"))
	})
	http.Handle("GET /", http.FileServer(http.Dir(content)))
	fmt.Fprintln(os.Stderr, http.ListenAndServe(*listen, nil))
	os.Exit(1)
}
