// Package control is the socket by which `krg` talks to the node's PID 1, from
// the host part and from inside the container: one JSON request on a line,
// one JSON answer on a line.
//
// Only root is listened to. The kernel vouches for the caller (SO_PEERCRED);
// the socket's mode keeps others from connecting in the first place.
package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"krgimage/node/supervise"
)

// Request is what the caller wants.
type Request struct {
	Command string `json:"command"` // poweroff, reboot, status, log
	Service string `json:"service,omitempty"`
	After   uint64 `json:"after,omitempty"` // log: leave out so many bytes of the service's output
}

// Answer is what PID 1 says.
type Answer struct {
	Error    string             `json:"error,omitempty"`
	Services []supervise.Status `json:"services,omitempty"`
	Log      string             `json:"log,omitempty"`
	LogEnd   uint64             `json:"log_end,omitempty"` // the next After
}

// Machine carries requests out.
type Machine interface {
	Handle(Request) (Answer, error)
}

// patience bounds the time for one request and its answer.
const patience = 10 * time.Second

// Server listens on a control socket.
type Server struct{ listener *net.UnixListener }

// Listen makes the socket at path, replacing a stale one.
func Listen(path string) (*Server, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("control socket: %w", err)
	}
	return &Server{l}, nil
}

// Serve answers requests until ctx ends, one connection after the other: they
// are short, and root's.
func (s *Server) Serve(ctx context.Context, m Machine) error {
	stop := context.AfterFunc(ctx, func() { s.listener.Close() })
	defer stop()
	for {
		conn, err := s.listener.AcceptUnix()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("control socket: %w", err)
		}
		serveOne(conn, m)
	}
}

func serveOne(conn *net.UnixConn, m Machine) {
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	answer, err := func() (Answer, error) {
		var r Request
		line, err := bufio.NewReader(io.LimitReader(conn, 4<<10)).ReadBytes('\n')
		if err != nil {
			return Answer{}, err
		}
		if uid, err := peer(conn); err != nil || uid != 0 {
			return Answer{}, errors.New("only root may do that")
		}
		if err := json.Unmarshal(line, &r); err != nil {
			return Answer{}, fmt.Errorf("bad request: %w", err)
		}
		return m.Handle(r)
	}()
	if err != nil {
		answer.Error = err.Error()
	}
	_ = json.NewEncoder(conn).Encode(answer)
}

func peer(conn *net.UnixConn) (uid uint32, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	cerr := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err = errors.Join(cerr, err); err != nil {
		return 0, err
	}
	return cred.Uid, nil
}

// Call sends one request to the first of paths that exists.
func Call(ctx context.Context, r Request, paths ...string) (Answer, error) {
	var conn net.Conn
	var err error
	for _, p := range paths {
		conn, err = (&net.Dialer{Timeout: patience}).DialContext(ctx, "unix", p)
		if err == nil || !errors.Is(err, os.ErrNotExist) {
			break
		}
	}
	switch {
	case errors.Is(err, os.ErrNotExist):
		return Answer{}, errors.New("this machine isn't a running node")
	case errors.Is(err, os.ErrPermission):
		return Answer{}, errors.New("only root may do that")
	case err != nil:
		return Answer{}, fmt.Errorf("reach the node's init: %w", err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	if err := json.NewEncoder(conn).Encode(r); err != nil {
		return Answer{}, fmt.Errorf("reach the node's init: %w", err)
	}
	var a Answer
	if err := json.NewDecoder(conn).Decode(&a); err != nil {
		return Answer{}, fmt.Errorf("the node's init doesn't answer: %w", err)
	}
	if a.Error != "" {
		return a, errors.New(a.Error)
	}
	return a, nil
}
