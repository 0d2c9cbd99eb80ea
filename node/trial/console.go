package trial

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"golang.org/x/sync/errgroup"
)

// ringSize is how much of a serial line's past a newcomer sees, in bytes.
const ringSize = 256 << 10

// Console is a machine's serial line: all output goes to a log and to a ring,
// and whoever is attached sees it from now on and may type. It lives over
// restarts of the machine.
type Console struct {
	log io.Writer

	mu      sync.Mutex
	ring    []byte                   // guarded by mu
	readers map[chan []byte]struct{} // guarded by mu
	line    io.Writer                // to the machine; nil: it is off; guarded by mu
}

func newConsole(log io.Writer) *Console {
	return &Console{log: log, readers: map[chan []byte]struct{}{}}
}

// run carries a machine's output until its end of the line closes.
func (c *Console) run(line net.Conn) {
	c.mu.Lock()
	c.line = line
	c.mu.Unlock()
	buf := make([]byte, 8<<10)
	for {
		n, err := line.Read(buf)
		c.put(buf[:n])
		if err != nil {
			break
		}
	}
	c.mu.Lock()
	c.line = nil
	c.mu.Unlock()
	line.Close()
}

func (c *Console) put(p []byte) {
	if len(p) == 0 {
		return
	}
	// A full disk must not stop the machine: its line would block.
	c.log.Write(p)
	chunk := bytes.Clone(p)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ring = append(c.ring, chunk...)
	if n := len(c.ring) - ringSize; n > 0 {
		c.ring = append([]byte(nil), c.ring[n:]...)
	}
	for r := range c.readers {
		select {
		case r <- chunk:
		default: // a reader that doesn't read loses output, not the others
		}
	}
}

// Write types on the console.
func (c *Console) Write(p []byte) (int, error) {
	c.mu.Lock()
	line := c.line
	c.mu.Unlock()
	if line == nil {
		return 0, errors.New("the machine is off")
	}
	return line.Write(p)
}

// Ring is a copy of the last output.
func (c *Console) Ring() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return bytes.Clone(c.ring)
}

// follow calls f with the past output and then with each piece, until f is
// done or ctx ends.
func (c *Console) follow(ctx context.Context, f func([]byte) (done bool, err error)) error {
	r := make(chan []byte, 1024)
	c.mu.Lock()
	chunk := bytes.Clone(c.ring)
	c.readers[r] = struct{}{}
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.readers, r)
		c.mu.Unlock()
	}()
	for {
		if done, err := f(chunk); done || err != nil {
			return err
		}
		select {
		case chunk = <-r:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Expect waits until the marker stands in the output, past or to come.
func (c *Console) Expect(ctx context.Context, marker string) error {
	m := newMatcher(marker)
	if err := c.follow(ctx, func(p []byte) (bool, error) { return m.find(p), nil }); err != nil {
		return fmt.Errorf("wait for %q on the console: %w", marker, err)
	}
	return nil
}

// Attach shows the past output on rw, then the live one, and types what comes
// from it, until rw or ctx ends. It doesn't close rw.
func (c *Console) Attach(ctx context.Context, rw io.ReadWriter) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		// Ends with its source, which may be a terminal that nobody closes:
		// nothing waits for it.
		defer cancel()
		buf := make([]byte, 1024)
		for {
			n, err := rw.Read(buf)
			if n > 0 && ctx.Err() == nil {
				c.Write(buf[:n]) // to a machine that is off: dropped
			}
			if err != nil {
				return
			}
		}
	}()
	err := c.follow(ctx, func(p []byte) (bool, error) {
		_, err := rw.Write(p)
		return false, err
	})
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// listen attaches everyone who connects to l, until ctx ends.
func (c *Console) listen(ctx context.Context, l net.Listener) error {
	group, ctx := errgroup.WithContext(ctx)
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	group.Go(func() error {
		for {
			conn, err := l.Accept()
			if err != nil {
				if ctx.Err() != nil {
					return nil
				}
				return fmt.Errorf("console socket: %w", err)
			}
			group.Go(func() error {
				stop := context.AfterFunc(ctx, func() { conn.Close() })
				defer stop()
				defer conn.Close()
				c.Attach(ctx, conn)
				return nil
			})
		}
	})
	return group.Wait()
}

// matcher finds a marker in a stream that comes in pieces.
type matcher struct {
	marker []byte
	rest   []byte // the end of what came before, shorter than the marker
}

func newMatcher(marker string) *matcher { return &matcher{marker: []byte(marker)} }

func (m *matcher) find(p []byte) bool {
	m.rest = append(m.rest, p...)
	if bytes.Contains(m.rest, m.marker) {
		return true
	}
	if n := len(m.rest) - len(m.marker) + 1; n > 0 {
		m.rest = append([]byte(nil), m.rest[n:]...)
	}
	return false
}
