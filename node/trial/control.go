package trial

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"strconv"
	"time"
)

// The control socket speaks HTTP: GET /status is the Report, POST
// /nodes/ID/ACTION acts on a machine. Who may connect is what the file system
// says of the socket.

// actions on a machine.
var actions = map[string]func(context.Context, *Cluster, *Node) error{
	"start":     func(ctx context.Context, _ *Cluster, n *Node) error { return n.Start(ctx) },
	"powerdown": func(ctx context.Context, _ *Cluster, n *Node) error { return n.Powerdown(ctx) },
	"reset":     func(ctx context.Context, _ *Cluster, n *Node) error { return n.Reset(ctx) },
	"pause":     func(ctx context.Context, _ *Cluster, n *Node) error { return n.Pause(ctx) },
	"resume":    func(ctx context.Context, _ *Cluster, n *Node) error { return n.Resume(ctx) },
	"kill": func(_ context.Context, _ *Cluster, n *Node) error {
		n.Kill()
		return nil
	},
	"unplug": func(_ context.Context, c *Cluster, n *Node) error { return c.setUp(n, false) },
	"plug":   func(_ context.Context, c *Cluster, n *Node) error { return c.setUp(n, true) },
}

func (c *Cluster) setUp(n *Node, up bool) error {
	c.Port(n.hw.ID).SetUp(up)
	c.changed()
	return nil
}

func (c *Cluster) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(c.Report())
	})
	mux.HandleFunc("POST /nodes/{id}/{action}", func(w http.ResponseWriter, r *http.Request) {
		id, _ := strconv.Atoi(r.PathValue("id"))
		n, act := c.Node(id), actions[r.PathValue("action")]
		switch {
		case n == nil:
			http.Error(w, "the trial has no node "+r.PathValue("id"), http.StatusNotFound)
		case act == nil:
			http.Error(w, "there is no action "+r.PathValue("action"), http.StatusNotFound)
		default:
			if err := act(r.Context(), c, n); err != nil {
				http.Error(w, err.Error(), http.StatusConflict)
				return
			}
			w.WriteHeader(http.StatusNoContent)
		}
	})
	return mux
}

func (c *Cluster) serveControl(ctx context.Context) error {
	l, err := listenUnix(c.rec.Control)
	if err != nil {
		return fmt.Errorf("control socket of the trial: %w", err)
	}
	srv := &http.Server{Handler: c.handler(), ReadHeaderTimeout: 10 * time.Second}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("control socket of the trial: %w", err)
	}
	return nil
}

// listenUnix listens on a socket file in place of a leftover one.
func listenUnix(path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return net.Listen("unix", path)
}

// Status asks the trial that runs in dir, or returns ErrNotRunning.
func Status(ctx context.Context, dir string) (Report, error) {
	var r Report
	body, err := call(ctx, dir, http.MethodGet, "/status")
	if err == nil {
		err = json.Unmarshal(body, &r)
	}
	return r, err
}

// Control acts on a machine of the trial that runs in dir: start, powerdown,
// reset, kill, pause, resume, unplug or plug.
func Control(ctx context.Context, dir string, node int, action string) error {
	_, err := call(ctx, dir, http.MethodPost, fmt.Sprintf("/nodes/%d/%s", node, action))
	return err
}

// AttachConsole shows a machine's serial line on out and types what comes from
// in, until in, the trial or ctx ends.
func AttachConsole(ctx context.Context, dir string, node int, in io.Reader, out io.Writer) error {
	r, err := running(dir)
	if err != nil {
		return err
	}
	for _, n := range r.Nodes {
		if n.ID != node {
			continue
		}
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", n.Console)
		if err != nil {
			return fmt.Errorf("console of node %d: %w", node, err)
		}
		defer conn.Close()
		stop := context.AfterFunc(ctx, func() { conn.Close() })
		defer stop()
		go func() {
			// Ends with in, which may be a terminal: nothing waits for it.
			io.Copy(conn, in)
			conn.Close()
		}()
		_, err = io.Copy(out, conn)
		if errors.Is(err, net.ErrClosed) {
			err = nil
		}
		return err
	}
	return fmt.Errorf("the trial has no node %d", node)
}

func call(ctx context.Context, dir, method, path string) ([]byte, error) {
	r, err := running(dir)
	if err != nil {
		return nil, err
	}
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", r.Control)
	}}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, method, "http://trial"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return nil, fmt.Errorf("the trial (process %d) doesn't answer: %w", r.Supervisor.PID, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err == nil && resp.StatusCode >= 300 {
		err = errors.New(string(bytes.TrimSpace(body)))
	}
	return body, err
}
