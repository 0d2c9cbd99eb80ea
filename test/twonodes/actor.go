// Package twonodes holds the tests of the shared root as two nodes see it: what
// one does is seen by the other at once, both change one tree at the same time,
// and the server is killed in the middle of it. The nodes are Linux NFS clients
// in User-Mode Linux (package uml), mounted with the options of real nodes.
package twonodes

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"krgimage/test/uml"
)

// actorPort is where an actor takes commands.
const actorPort = 2

// actor is a program in a guest that does file operations one at a time, when
// it is told to, so that a test can say what happened before what.
type actor struct {
	conn net.Conn
	in   *bufio.Reader
}

// act starts one in a guest; it ends with the test.
func act(t testing.TB, n *uml.Net, g *uml.Guest) *actor {
	t.Helper()
	go g.Run(t.Context(), uml.Call("actor"))
	for ctx := t.Context(); ; {
		conn, err := n.Dial(ctx, netip.AddrPortFrom(g.Addr, actorPort))
		if err == nil {
			t.Cleanup(func() { conn.Close() })
			return &actor{conn, bufio.NewReader(conn)}
		}
		select {
		case <-ctx.Done():
			t.Fatal(err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// do has the actor do something and returns what came of it; errors are part of
// that.
func (a *actor) do(ctx context.Context, args ...string) (string, error) {
	defer context.AfterFunc(ctx, func() { a.conn.SetDeadline(time.Unix(1, 0)) })()
	if err := json.NewEncoder(a.conn).Encode(args); err != nil {
		return "", err
	}
	line, err := a.in.ReadBytes('\n')
	if err != nil {
		return "", err
	}
	var result string
	return result, json.Unmarshal(line, &result)
}

// actorMain is the actor. It serves one connection.
func actorMain(args []string) int {
	l, err := net.Listen("tcp4", fmt.Sprintf(":%d", actorPort))
	if err != nil {
		fmt.Println(err)
		return 1
	}
	conn, err := l.Accept()
	if err != nil {
		fmt.Println(err)
		return 1
	}
	unix.Umask(0)
	dec, enc := json.NewDecoder(conn), json.NewEncoder(conn)
	open := map[string]*os.File{}
	for {
		var command []string
		if dec.Decode(&command) != nil {
			return 0
		}
		result, err := perform(open, command[0], command[1:])
		if err != nil {
			result = err.Error()
			if i := strings.LastIndex(result, ": "); i >= 0 {
				result = result[i+2:]
			}
		}
		if enc.Encode(result) != nil {
			return 0
		}
	}
}

// perform does one operation. The open files are by name.
func perform(open map[string]*os.File, what string, args []string) (string, error) {
	switch what {
	case "write": // open, write, close
		return "", os.WriteFile(args[0], []byte(args[1]), 0o644)
	case "append":
		f, err := os.OpenFile(args[0], os.O_APPEND|os.O_WRONLY|os.O_CREATE, 0o644)
		if err != nil {
			return "", err
		}
		defer f.Close()
		_, err = f.WriteString(args[1])
		return "", err
	case "unlink":
		return "", unix.Unlink(args[0])
	case "rmdir":
		return "", unix.Rmdir(args[0])
	case "mkdir":
		return "", os.Mkdir(args[0], 0o755)
	case "rename":
		return "", os.Rename(args[0], args[1])
	case "link":
		return "", os.Link(args[0], args[1])
	case "symlink":
		return "", os.Symlink(args[0], args[1])
	case "chmod":
		return "", os.Chmod(args[0], 0o600)
	case "chown":
		return "", os.Chown(args[0], 7, 8)
	case "truncate":
		return "", os.Truncate(args[0], 2)
	case "touch":
		return "", os.Chtimes(args[0], time.Unix(5, 0), time.Unix(6, 0))

	case "stat":
		var st unix.Stat_t
		if err := unix.Lstat(args[0], &st); err != nil {
			return "", err
		}
		return fmt.Sprintf("mode %o owner %d:%d size %d links %d mtime %d", st.Mode, st.Uid, st.Gid, st.Size, st.Nlink, st.Mtim.Sec), nil
	case "fresh stat": // as one who has moved here does first
		var sx unix.Statx_t
		if err := unix.Statx(unix.AT_FDCWD, filepath.Dir(args[0]), unix.AT_STATX_FORCE_SYNC, unix.STATX_BASIC_STATS, &sx); err != nil {
			return "", err
		}
		return perform(open, "stat", args)
	case "read":
		b, err := os.ReadFile(args[0])
		return string(b), err
	case "readlink":
		return os.Readlink(args[0])
	case "list":
		es, err := os.ReadDir(args[0])
		var names []string
		for _, e := range es {
			names = append(names, e.Name())
		}
		sort.Strings(names)
		return strings.Join(names, " "), err

	case "open":
		f, err := os.OpenFile(args[0], os.O_RDWR|os.O_CREATE, 0o644)
		open[args[0]] = f
		return "", err
	case "pread":
		buf := make([]byte, 100)
		n, err := unix.Pread(int(open[args[0]].Fd()), buf, 0)
		return string(buf[:max(n, 0)]), err
	case "pwrite":
		_, err := open[args[0]].WriteAt([]byte(args[1]), 0)
		return "", err
	case "fstat":
		info, err := open[args[0]].Stat()
		if err != nil {
			return "", err
		}
		return fmt.Sprint(info.Size()), nil
	case "fsync":
		return "", open[args[0]].Sync()
	case "sync":
		unix.Sync()
		return "", nil
	case "close":
		return "", open[args[0]].Close()
	}
	return "", fmt.Errorf("no operation %q", what)
}
