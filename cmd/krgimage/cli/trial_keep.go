package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"krgimage/configs"
	"krgimage/images/progress"
	"krgimage/nfsroot/live"
	"krgimage/node/trial"
)

// keepTrial starts the trial in a process of its own that outlives this one,
// shows its progress, and returns when the cluster is ready.
func (a *app) keepTrial(ctx context.Context, c configs.Cluster, f trialFlags) error {
	state, err := a.state()
	if err != nil {
		return err
	}
	if err := live.Preflight(state); err != nil {
		return err
	}
	dir := trialDir(state)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("make the state directory: %w", err)
	}
	if err := refuseSecondTrial(ctx, state); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	logFile := filepath.Join(dir, "trial.log")
	log, err := os.Create(logFile)
	if err != nil {
		return err
	}
	defer log.Close()
	global := []string{"--config", a.configFile, "--state", state}
	if a.cacheDir != "" {
		global = append(global, "--cache", a.cacheDir)
	}
	if a.verbose {
		global = append(global, "--verbose")
	}
	child := exec.Command(self, append(global, f.args(f.style(a))...)...)
	child.Stdout, child.Stderr = log, log
	child.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := child.Start(); err != nil {
		return fmt.Errorf("start the trial: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- child.Wait() }()

	shown := tail{file: logFile, out: a.Out}
	defer shown.copy()
	poll := time.NewTicker(200 * time.Millisecond)
	defer poll.Stop()
	for {
		select {
		case <-ctx.Done():
			stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
			defer cancel()
			err := child.Process.Signal(syscall.SIGTERM)
			select {
			case <-ended:
			case <-stop.Done():
				err = errors.Join(err, child.Process.Kill())
			}
			return errors.Join(ctx.Err(), err)
		case err := <-ended:
			shown.copy()
			if err == nil {
				return errors.New("the trial has stopped before it was ready")
			}
			return exitError(1) // it has said why, in the log that was shown
		case <-poll.C:
			shown.copy()
			report, err := trial.Status(ctx, dir)
			if err == nil && allReady(report) {
				shown.copy()
				if !f.asJSON {
					a.printReady(c, report)
					fmt.Fprintln(a.Out, "'krgimage trial stop' stops the cluster")
				}
				return nil
			}
		}
	}
}

// refuseSecondTrial returns an error if a trial runs on the state directory.
func refuseSecondTrial(ctx context.Context, state string) error {
	if _, err := trial.Status(ctx, trialDir(state)); err != nil {
		return nil
	}
	return fmt.Errorf("%w on this state directory: 'krgimage ssh' logs in, 'krgimage trial stop' ends it", trial.ErrRunning)
}

// tail copies what was added to a file.
type tail struct {
	file string
	out  io.Writer
	at   int64
}

func (t *tail) copy() {
	f, err := os.Open(t.file)
	if err != nil {
		return
	}
	defer f.Close()
	n, _ := io.Copy(t.out, io.NewSectionReader(f, t.at, 1<<30))
	t.at += n
}

func allReady(r trial.Report) bool {
	for _, n := range r.Nodes {
		if n.Stage != "ready" {
			return false
		}
	}
	return len(r.Nodes) > 0
}

// args are the flags for the process that --keep leaves behind.
func (f *trialFlags) args(style progress.Style) []string {
	shown := "plain"
	switch style {
	case progress.Terminal:
		shown = "terminal"
	case progress.JSON:
		shown = "json"
	}
	args := []string{"trial", "--detached", shown}
	add := func(given bool, name, value string) {
		if given {
			args = append(args, "--"+name+"="+value)
		}
	}
	add(f.nodes != 0, "nodes", strconv.Itoa(f.nodes))
	add(f.memory != "", "memory", f.memory)
	add(f.cpus != 0, "cpus", strconv.Itoa(f.cpus))
	add(f.uefi, "uefi", "true")
	add(f.console, "console", "true")
	add(f.capture != "", "pcap", f.capture)
	return args
}
