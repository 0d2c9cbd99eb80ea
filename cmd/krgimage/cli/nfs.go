package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"krgimage/nfsroot/nfs"
)

func (a *app) nfsCommand() *cobra.Command {
	var asJSON, prometheus bool
	cmd := &cobra.Command{
		Use:   "nfs",
		Short: "Show what the file server of the shared root does",
		Long: `Show the file server's connections and, for each procedure, the number of
calls and errors, their mean time, the time that 99 of 100 calls stay below, and
the bytes received and sent, since the server started. Works while 'serve' or
'trial' runs. --prometheus prints all counters of the head node in Prometheus
form.`,
		Example: "  krgimage nfs\n  krgimage nfs --prometheus > /var/lib/prometheus/node-exporter/krgimage.prom",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			state, err := a.state()
			if err != nil {
				return err
			}
			client, err := dialHead(cmd.Context(), state)
			if err != nil {
				return err
			}
			defer client.Close()
			if prometheus {
				return client.Metrics(cmd.Context(), a.Out)
			}
			var stats nfs.Stats
			if err := client.NFS(cmd.Context(), &stats); err != nil {
				return err
			}
			if asJSON {
				enc := json.NewEncoder(a.Out)
				enc.SetIndent("", "  ")
				return enc.Encode(stats)
			}
			return printNFS(a.Out, stats)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().BoolVar(&prometheus, "prometheus", false, "print all counters of the head node in Prometheus form")
	cmd.MarkFlagsMutuallyExclusive("json", "prometheus")
	return cmd
}

func printNFS(out io.Writer, s nfs.Stats) error {
	fmt.Fprintf(out, "connections %d (accepted %d, refused %d), open files %d\n", s.Open, s.Accepted, s.Refused, s.CachedFiles)
	fmt.Fprintf(out, "replayed %d, malformed records %d, malformed arguments %d, bad handles %d, internal errors %d, unknown calls %d\n",
		s.Replayed, s.BadRecords, s.Garbage, s.BadHandles, s.Panics, s.Unknown)
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "PROCEDURE\tCALLS\tERRORS\tMEAN\t99%\tRECEIVED\tSENT")
	for _, name := range slices.Sorted(maps.Keys(s.Procs)) {
		p := s.Procs[name]
		mean := (p.Time / time.Duration(max(p.Calls, 1))).Round(time.Microsecond)
		fmt.Fprintf(w, "%s\t%d\t%d\t%s\t<%s\t%d\t%d\n", name, p.Calls, p.Errors, mean, p.Quantile(0.99).Round(time.Microsecond), p.In, p.Out)
	}
	return w.Flush()
}
