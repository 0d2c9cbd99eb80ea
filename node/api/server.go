package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Server answers tools. Make one with NewServer.
type Server struct {
	backend Backend
	log     *slog.Logger
	mux     *http.ServeMux
}

// NewServer returns a server in front of b.
func NewServer(b Backend, log *slog.Logger) *Server {
	s := &Server{backend: b, log: log.With("component", "api"), mux: http.NewServeMux()}
	s.mux.HandleFunc("GET /v1/cluster", func(w http.ResponseWriter, r *http.Request) { writeJSON(w, http.StatusOK, b.Status()) })
	s.mux.HandleFunc("GET /v1/cluster/watch", s.watch)
	s.mux.HandleFunc("POST /v1/nodes/add", s.nodes(b.Add))
	s.mux.HandleFunc("POST /v1/nodes/del", s.nodes(b.Del))
	s.mux.HandleFunc("POST /v1/cluster/poweroff", s.rootOnly(func(r *http.Request) error { return b.Poweroff(r.Context()) }))
	s.mux.HandleFunc("POST /v1/cluster/reboot", s.rootOnly(func(r *http.Request) error { return b.Reboot(r.Context()) }))
	return s
}

// Handle adds a handler for other services of the daemon.
func (s *Server) Handle(pattern string, h http.Handler) { s.mux.Handle(pattern, h) }

// Listen makes the socket at path, for everybody, in place of a stale one.
func Listen(path string) (*net.UnixListener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("cluster socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("cluster socket: %w", err)
	}
	// A daemon that is started again must not take away its successor's socket.
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o666); err != nil {
		l.Close()
		return nil, fmt.Errorf("cluster socket: %w", err)
	}
	return l, nil
}

// maxBody bounds a request's body: 256 ids are less.
const maxBody = 16 << 10 // bytes

// Serve answers on l until ctx ends, and closes l.
func (s *Server) Serve(ctx context.Context, l *net.UnixListener) error {
	server := &http.Server{
		Handler:           s.mux,
		ReadHeaderTimeout: 10 * time.Second,
		MaxHeaderBytes:    8 << 10,
		BaseContext:       func(net.Listener) context.Context { return ctx }, // ends watches and waits
		ConnContext:       withCaller,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	err := server.Serve(l)
	if stop() {
		server.Close()
		return fmt.Errorf("cluster socket: %w", err)
	}
	return nil
}

type callerKey struct{}

// withCaller notes who connected. A caller who can't be found out is nobody.
func withCaller(ctx context.Context, conn net.Conn) context.Context {
	if c, err := peer(conn); err == nil {
		return context.WithValue(ctx, callerKey{}, c)
	}
	return ctx
}

// CallerOf is who sent a request that came through a Server.
func CallerOf(ctx context.Context) (Caller, bool) {
	c, ok := ctx.Value(callerKey{}).(Caller)
	return c, ok
}

func peer(conn net.Conn) (Caller, error) {
	u, ok := conn.(*net.UnixConn)
	if !ok {
		return Caller{}, errors.New("not a unix socket")
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return Caller{}, err
	}
	var cred *unix.Ucred
	cerr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err = errors.Join(cerr, err); err != nil {
		return Caller{}, err
	}
	return Caller{PID: int(cred.Pid), UID: cred.Uid, GID: cred.Gid}, nil
}

func (s *Server) watch(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/jsonl")
	out, flush := json.NewEncoder(w), http.NewResponseController(w)
	for status := range s.backend.Watch(r.Context()) {
		if out.Encode(status) != nil || flush.Flush() != nil {
			return
		}
	}
}

// idList is the body of add and del.
type idList struct {
	IDs []int `json:"ids"`
}

func (s *Server) nodes(do func(context.Context, []int) error) http.HandlerFunc {
	return s.rootOnly(func(r *http.Request) error {
		var list idList
		body := http.MaxBytesReader(nil, r.Body, maxBody)
		if err := json.NewDecoder(body).Decode(&list); err != nil {
			return Errorf(unix.EINVAL, "bad request: %v", err)
		}
		return do(r.Context(), list.IDs)
	})
}

func (s *Server) rootOnly(do func(*http.Request) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		c, ok := CallerOf(r.Context())
		if !ok || c.UID != 0 {
			s.log.Warn("refused: only root may do that", "request", r.URL.Path, "uid", c.UID, "pid", c.PID)
			writeJSON(w, http.StatusForbidden, Errorf(unix.EPERM, "only root may do that"))
			return
		}
		if err := do(r); err != nil {
			writeJSON(w, http.StatusConflict, AsError(err))
			return
		}
		writeJSON(w, http.StatusOK, struct{}{})
	}
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v)
}
