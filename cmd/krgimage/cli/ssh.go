package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"krgimage/configs"
	"krgimage/node/trial"
	"krgimage/pxe/head"
)

func (a *app) sshCommand() *cobra.Command {
	var user string
	cmd := &cobra.Command{
		Use:   "ssh [flags] [node] [-- command...]",
		Short: "Log in to the cluster, or run a command there",
		Long: `Open a shell on a node of the running cluster (its id or host name; without
one, the first that is ready), or run a command on it. The exit code is the
command's.

It uses the head node's own key and knows the cluster's host key. Any ssh client
does the same: 'krgimage trial status' and 'krgimage nodes' show addresses, the
port is 2222 on real machines.`,
		Example: `  krgimage ssh
  krgimage ssh 2 -- uname -a
  krgimage ssh --user root krg-1`,
		RunE: func(cmd *cobra.Command, args []string) error {
			node, command, err := splitArgs(cmd, args)
			if err != nil {
				return err
			}
			c, err := a.load()
			if err != nil {
				return err
			}
			state, err := a.state()
			if err != nil {
				return err
			}
			if user == "" {
				user = defaultUser(c)
			}
			target, err := findNode(cmd.Context(), state, node)
			if err != nil {
				return err
			}
			return a.runSSH(cmd.Context(), state, user, target, command)
		},
	}
	cmd.Flags().StringVarP(&user, "user", "u", "", "log in as this `user` (default: the first of users, else root)")
	return cmd
}

// defaultUser is who logs in when nobody is named.
func defaultUser(c configs.Cluster) string {
	if len(c.Users) == 0 {
		return "root"
	}
	return c.Users[0].Name
}

// splitArgs takes [node] [-- command...] apart.
func splitArgs(cmd *cobra.Command, args []string) (node string, command []string, err error) {
	dash := cmd.ArgsLenAtDash()
	if dash < 0 {
		dash = len(args)
	}
	if dash > 1 {
		return "", nil, usageError{fmt.Errorf("one node at a time, but got %s; a command comes after --", strings.Join(args[:dash], " "))}
	}
	if dash == 1 {
		node = args[0]
	}
	return node, args[dash:], nil
}

// endpoint is where a node's sshd can be reached from here.
type endpoint struct {
	host string
	port int
}

// findNode looks a node up among those of the running trial, or else of the
// running head node.
func findNode(ctx context.Context, state, name string) (endpoint, error) {
	type candidate struct {
		id       int
		hostname string
		ready    bool
		at       endpoint
	}
	var all []candidate
	report, err := trial.Status(ctx, trialDir(state))
	switch {
	case err == nil:
		for _, n := range report.Nodes {
			all = append(all, candidate{n.ID, n.Hostname, n.Stage == "ready", endpoint{n.SSHHost(), n.SSHPort()}})
		}
	case !errors.Is(err, trial.ErrNotRunning):
		return endpoint{}, err
	default:
		client, err := head.Dial(ctx, state)
		if err != nil {
			return endpoint{}, err
		}
		defer client.Close()
		list, err := client.Nodes(ctx)
		if err != nil {
			return endpoint{}, err
		}
		for _, n := range list {
			all = append(all, candidate{n.ID, n.Hostname, n.Stage() == "ready", endpoint{n.Address.String(), 2222}})
		}
	}
	var known []string
	for _, n := range all {
		if name == "" && n.ready || name == strconv.Itoa(n.id) || name == n.hostname {
			return n.at, nil
		}
		known = append(known, fmt.Sprintf("%d (%s)", n.id, n.hostname))
	}
	if name == "" {
		return endpoint{}, errors.New("no node is ready yet: 'krgimage nodes' shows how far they are")
	}
	return endpoint{}, fmt.Errorf("there is no node %q; there are: %s", name, strings.Join(known, ", "))
}

// runSSH runs the host's ssh client with the head node's key. Its exit code is
// the command's, or 255 if ssh itself failed.
func (a *app) runSSH(ctx context.Context, state, user string, to endpoint, command []string) error {
	key, _, err := clientKey(state)
	if err != nil {
		return err
	}
	program, err := exec.LookPath("ssh")
	if err != nil {
		return errors.New("there is no ssh client on this machine: apt-get install openssh-client")
	}
	args := []string{
		"-i", key, "-p", strconv.Itoa(to.port), "-l", user,
		"-o", "IdentitiesOnly=yes", "-o", "HostKeyAlias=" + hostAlias,
		"-o", "UserKnownHostsFile=" + knownHosts(state), "-o", "StrictHostKeyChecking=yes",
		"-o", "LogLevel=ERROR", to.host,
	}
	if len(command) > 0 {
		args = append(append(args, "--"), command...)
	}
	ssh := exec.CommandContext(ctx, program, args...)
	ssh.Stdin, ssh.Stdout, ssh.Stderr = a.In, a.Out, a.Err
	ssh.Cancel = func() error { return ssh.Process.Signal(os.Interrupt) }
	err = ssh.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() >= 0 {
		return exitError(exit.ExitCode())
	}
	return err
}
