// Package container runs a node's part of the Kerrighed container: processes
// over the shared root with their own PID, mount, UTS and IPC namespaces and
// the host's network.
//
// Command makes the command that PID 1 of the host supervises: krg once more,
// in fresh namespaces, as "krginit". Main is what runs there: it builds the
// view of the shared root, drops the host's, and stays as the container's
// init, which reaps orphans and supervises sshd.
//
// Private to a node are /dev, /proc, /sys and /run; all else, /tmp too, is the
// shared tree. The container is a place, not a jail: its root is root.
package container

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"krgimage/node/settings"
)

// Config is what the container's init needs to know.
type Config struct {
	Root     string           `json:"root"`             // the shared root, a mount point
	Hostname string           `json:"hostname"`         // of the node
	Domain   string           `json:"domain,omitempty"` // NIS domain, as Kerrighed's nodes had; may be empty
	Shared   string           `json:"shared"`           // directory of the host that becomes /run/krg
	Shares   []settings.Share `json:"shares,omitempty"` // directories besides the root
	Services []Service        `json:"services"`
	Grace    time.Duration    `json:"grace"` // time for processes to go after SIGTERM
}

// Service is a program that the container's init keeps running.
type Service struct {
	Name string   `json:"name"`
	Argv []string `json:"argv"`
}

// SSHD is the server that lets users in, on port 2222.
func SSHD() Service {
	return Service{Name: "sshd", Argv: []string{"/usr/sbin/sshd", "-D", "-e", "-f", "/etc/krgimage/sshd_config"}}
}

// Name is argv[0] of the container's init.
const Name = "krginit"

// configFD is where the init finds its Config.
const configFD = 3

// Environment of the container's init and, but for what sshd sets, of all in it.
var environment = []string{"HOME=/", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=linux", "container=krg"}

// Command returns a command that starts the container's init from the krg
// binary at path. cgroup, if not nil, is the directory of the cgroup to start
// it in.
func Command(path string, c Config, cgroup *os.File) (*exec.Cmd, error) {
	text, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer w.Close()
	if _, err := w.Write(text); err != nil { // far below the size of a pipe
		r.Close()
		return nil, err
	}
	cmd := exec.Command(path)
	cmd.Args = []string{Name}
	cmd.Env = environment
	cmd.ExtraFiles = []*os.File{r}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		Setsid:     true,
	}
	if cgroup != nil {
		cmd.SysProcAttr.UseCgroupFD = true
		cmd.SysProcAttr.CgroupFD = int(cgroup.Fd())
	}
	return cmd, nil
}

// IsInit reports whether this process was started by Command.
func IsInit() bool {
	var st unix.Stat_t
	return os.Getpid() == 1 && unix.Fstat(configFD, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFIFO
}

func readConfig() (Config, error) {
	f := os.NewFile(configFD, "config")
	defer f.Close()
	var c Config
	if err := json.NewDecoder(io.LimitReader(f, 64<<10)).Decode(&c); err != nil {
		return c, fmt.Errorf("container settings: %w", err)
	}
	if c.Root == "" || c.Root == "/" {
		return c, errors.New("container settings: no root")
	}
	return c, nil
}
