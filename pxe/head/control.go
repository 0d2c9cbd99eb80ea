package head

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"krgimage/configs"
	"krgimage/pxe/nodes"
)

// The control socket tells other commands of the same user what the head knows:
//
//	GET /v1/nodes        all machines, a JSON array of nodes.Node
//	GET /v1/nodes/watch  the same as JSON lines, then every machine that changes
//	GET /v1/health       a Health
//	GET /v1/nfs          the file server's counters
//	GET /metrics         all counters in Prometheus form
//	POST /v1/nodes/admit {"mac":"…"} or {"id":3}: lets a machine in; its nodes.Node
//	POST /v1/nodes/revoke the same: locks it out
//
// It is a unix socket with mode 0600 in a directory with mode 0700.
const controlName = "control.sock"

// ErrNotRunning says that no head serves the state directory.
var ErrNotRunning = errors.New("no head node is running for this state directory; start it with krgimage serve or krgimage trial")

// ErrRunning says that a head serves the state directory already.
var ErrRunning = errors.New("a head node is running for this state directory already")

// Health says which services are up.
type Health struct {
	OK       bool              `json:"ok"`
	Services map[string]string `json:"services"` // "up", "ended" or the error
}

type health struct {
	mu       sync.Mutex
	services map[string]string // guarded by mu
	failed   bool              // guarded by mu
}

func (h *health) up(name string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.services == nil {
		h.services = map[string]string{}
	}
	h.services[name] = "up"
}

func (h *health) down(name string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.services[name] = "ended"
	if err != nil {
		h.services[name], h.failed = err.Error(), true
	}
}

func (h *health) report() Health {
	h.mu.Lock()
	defer h.mu.Unlock()
	return Health{OK: !h.failed, Services: maps.Clone(h.services)}
}

// maxSocketPath is what fits in a sockaddr_un (108 bytes with the final zero).
const maxSocketPath = 107

// listenControl makes the control socket in dir. A socket that a killed head
// left behind is replaced; one that answers is another head's.
func listenControl(dir string) (net.Listener, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	path := filepath.Join(dir, controlName)
	conn, err := dialControl(context.Background(), dir)
	switch {
	case err == nil:
		conn.Close()
		return nil, fmt.Errorf("control socket %s: %w", path, ErrRunning)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("control socket %s belongs to another user: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	var l net.Listener
	if err := withShortPath(dir, func(short string) error {
		ul, err := net.ListenUnix("unix", &net.UnixAddr{Name: short, Net: "unix"})
		if err == nil {
			ul.SetUnlinkOnClose(false) // the short path is gone by then
			l = &controlListener{ul, path}
		}
		return err
	}); err != nil {
		return nil, fmt.Errorf("control socket %s: %w", path, err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("control socket: %w", err)
	}
	return l, nil
}

type controlListener struct {
	*net.UnixListener
	path string
}

// Close may be called twice; only the first call removes the socket, the second
// could meet the next head's.
func (l *controlListener) Close() error {
	err := l.UnixListener.Close()
	if err == nil {
		os.Remove(l.path)
	}
	return err
}

// withShortPath calls f with a path of the control socket that fits in an
// address, by way of the directory's descriptor if need be.
func withShortPath(dir string, f func(path string) error) error {
	path := filepath.Join(dir, controlName)
	if len(path) <= maxSocketPath {
		return f(path)
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return f(fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), controlName))
}

func dialControl(ctx context.Context, dir string) (conn net.Conn, err error) {
	err = withShortPath(dir, func(path string) error {
		conn, err = (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "unix", path)
		return err
	})
	return conn, err
}

func (h *Head) serveControl(ctx context.Context, l net.Listener) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/nodes", func(w http.ResponseWriter, r *http.Request) { writeJSON(w, h.nodes.Snapshot()) })
	mux.HandleFunc("GET /v1/health", func(w http.ResponseWriter, r *http.Request) { writeJSON(w, h.health.report()) })
	if h.cfg.NFSStats != nil {
		mux.HandleFunc("GET /v1/nfs", func(w http.ResponseWriter, r *http.Request) { writeJSON(w, h.cfg.NFSStats()) })
	}
	if h.cfg.Metrics != nil {
		mux.Handle("GET /metrics", h.cfg.Metrics)
	}
	mux.HandleFunc("GET /v1/nodes/watch", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/jsonl")
		out, flush := json.NewEncoder(w), http.NewResponseController(w)
		flush.Flush()
		for n := range h.nodes.Watch(r.Context()) {
			if out.Encode(n) != nil || flush.Flush() != nil {
				return
			}
		}
	})
	mux.HandleFunc("POST /v1/nodes/admit", h.byHand(h.Admit))
	mux.HandleFunc("POST /v1/nodes/revoke", h.byHand(h.Revoke))
	server := &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 10 * time.Second,
		BaseContext:       func(net.Listener) context.Context { return ctx }, // ends the watches
		ErrorLog:          slog.NewLogLogger(h.log.Handler(), slog.LevelDebug),
	}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	err := server.Serve(l)
	if stop() {
		server.Close()
		return err
	}
	return nil
}

// machineRequest names a machine: by MAC or, if that is empty, by id.
type machineRequest struct {
	MAC configs.MAC `json:"mac,omitempty"`
	ID  int         `json:"id"`
}

func (h *Head) byHand(do func(context.Context, configs.MAC, int) (nodes.Node, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var request machineRequest
		err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<10)).Decode(&request)
		var n nodes.Node
		if err == nil {
			n, err = do(r.Context(), request.MAC, request.ID)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		writeJSON(w, n)
	}
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.Encode(v)
}

// Client talks to the head of a state directory.
type Client struct {
	http *http.Client
}

// Dial connects to the head that serves stateDir. The error is ErrNotRunning
// when there is none.
func Dial(ctx context.Context, stateDir string) (*Client, error) {
	dir := filepath.Join(stateDir, "head")
	conn, err := dialControl(ctx, dir)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("the head node of %s belongs to another user (is sudo needed?): %w", stateDir, err)
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case err != nil:
		return nil, fmt.Errorf("%s: %w", stateDir, ErrNotRunning)
	}
	conn.Close()
	return &Client{&http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return dialControl(ctx, dir) },
	}}}, nil
}

// Close ends the client's idle connections.
func (c *Client) Close() error {
	c.http.CloseIdleConnections()
	return nil
}

// Nodes returns all machines by id.
func (c *Client) Nodes(ctx context.Context) ([]nodes.Node, error) {
	var all []nodes.Node
	return all, c.get(ctx, "/v1/nodes", &all)
}

// Admit lets a machine in, by its MAC or, if that is empty, by its id.
func (c *Client) Admit(ctx context.Context, mac configs.MAC, id int) (nodes.Node, error) {
	return c.byHand(ctx, "/v1/nodes/admit", machineRequest{mac, id})
}

// Revoke locks a machine out, by its MAC or, if that is empty, by its id.
func (c *Client) Revoke(ctx context.Context, mac configs.MAC, id int) (nodes.Node, error) {
	return c.byHand(ctx, "/v1/nodes/revoke", machineRequest{mac, id})
}

func (c *Client) byHand(ctx context.Context, path string, request machineRequest) (n nodes.Node, err error) {
	body, err := json.Marshal(request)
	if err != nil {
		return n, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://head"+path, bytes.NewReader(body))
	if err != nil {
		return n, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return n, fmt.Errorf("head node: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
		return n, errors.New(strings.TrimSpace(string(text)))
	}
	if err := json.NewDecoder(resp.Body).Decode(&n); err != nil {
		return n, fmt.Errorf("head node: %s: %w", path, err)
	}
	return n, nil
}

// Health says which services are up.
func (c *Client) Health(ctx context.Context) (Health, error) {
	var h Health
	err := c.get(ctx, "/v1/health", &h)
	return h, err
}

// NFS reads the file server's counters into stats.
func (c *Client) NFS(ctx context.Context, stats any) error { return c.get(ctx, "/v1/nfs", stats) }

// Metrics copies the head's counters in Prometheus form to out.
func (c *Client) Metrics(ctx context.Context, out io.Writer) error {
	resp, err := c.open(ctx, "/metrics")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(out, resp.Body); err != nil {
		return fmt.Errorf("head node: /metrics: %w", err)
	}
	return nil
}

// Watch yields every machine as it is now, and then each one that changes, until
// ctx ends or the head does. An error is the last thing it yields; the end of
// ctx is none.
func (c *Client) Watch(ctx context.Context) iter.Seq2[nodes.Node, error] {
	return func(yield func(nodes.Node, error) bool) {
		resp, err := c.open(ctx, "/v1/nodes/watch")
		if err != nil {
			if ctx.Err() == nil {
				yield(nodes.Node{}, err)
			}
			return
		}
		defer resp.Body.Close()
		lines := bufio.NewScanner(resp.Body)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			var n nodes.Node
			if err := json.Unmarshal(lines.Bytes(), &n); err != nil {
				yield(nodes.Node{}, fmt.Errorf("head node: %w", err))
				return
			}
			if !yield(n, nil) {
				return
			}
		}
		if ctx.Err() == nil {
			yield(nodes.Node{}, fmt.Errorf("the head node has ended: %w", ErrNotRunning))
		}
	}
}

func (c *Client) get(ctx context.Context, path string, v any) error {
	resp, err := c.open(ctx, path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(v); err != nil {
		return fmt.Errorf("head node: %s: %w", path, err)
	}
	return nil
}

func (c *Client) open(ctx context.Context, path string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://head"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("head node: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		resp.Body.Close()
		return nil, fmt.Errorf("head node: %s: %s", path, resp.Status)
	}
	return resp, nil
}
