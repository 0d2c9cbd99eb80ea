package nfs

import (
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/go-git/go-billy/v5/osfs"
	gonfs "github.com/willscott/go-nfs"
	"github.com/willscott/go-nfs/helpers"
)

// BenchmarkAgainst runs the same client against this server and go-nfs, over
// loopback, and reports how many times faster this one is in the same run.
func BenchmarkAgainst(b *testing.B) {
	needRoot(b)
	const files, size, streams = 1000, 64 << 20, 4
	dir := b.TempDir()
	for i := range files {
		os.WriteFile(filepath.Join(dir, string(rune('a'+i%26))+string(rune('a'+i/26))), nil, 0o644)
	}
	if err := os.WriteFile(filepath.Join(dir, "big"), make([]byte, size), 0o644); err != nil {
		b.Fatal(err)
	}
	_, own, _ := serve(b, Export{Path: "/", Dir: dir})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer ln.Close()
	handler := helpers.NewCachingHandler(helpers.NewNullAuthHandler(osfs.New(dir)), 4096)
	go gonfs.Serve(ln, handler)

	for _, bench := range []struct {
		name  string
		bytes int64
		run   func(c *client, handles [][]byte, i int)
	}{
		{"getattr", 0, func(c *client, handles [][]byte, i int) { c.getattr(handles[i%len(handles)]) }},
		{"lookup", 0, func(c *client, _ [][]byte, i int) { c.lookup(c.root, string(rune('a'+i%26))+string(rune('a'+i/26%38))) }},
		{"read4k", 4 << 10, func(c *client, handles [][]byte, i int) {
			c.read(handles[0], uint64(i)*(4<<10)%size, 4<<10)
		}},
		{"read1M", 1 << 20, func(c *client, handles [][]byte, i int) {
			c.read(handles[0], uint64(i)*(1<<20)%size, 1<<20)
		}},
	} {
		b.Run(bench.name, func(b *testing.B) {
			measure := func(addr string) time.Duration {
				var clients []*client
				var handles [][]byte
				for range streams {
					clients = append(clients, connect(b, addr, "/", 0, 0))
				}
				handles = append(handles, clients[0].walk("big"))
				for i := range files {
					handles = append(handles, clients[0].walk(string(rune('a'+i%26))+string(rune('a'+i/26))))
				}
				begin := time.Now()
				var wg sync.WaitGroup
				for n, c := range clients {
					wg.Go(func() {
						for i := n; i < b.N; i += streams {
							bench.run(c, handles, i)
						}
					})
				}
				wg.Wait()
				return time.Since(begin)
			}
			b.SetBytes(bench.bytes)
			ours := measure(own)
			b.StopTimer()
			theirs := measure(ln.Addr().String())
			b.ReportMetric(float64(b.N)/ours.Seconds(), "own/s")
			b.ReportMetric(float64(b.N)/theirs.Seconds(), "go-nfs/s")
			b.ReportMetric(theirs.Seconds()/ours.Seconds(), "times")
		})
	}
}
