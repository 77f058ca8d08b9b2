import EdgeLlamaCore
import SwiftUI

/// Settings of a chat; what is no number, or out of bounds, cannot be entered.
struct SettingsView: View {
    @Environment(\.dismiss) private var dismiss
    @State private var settings: ChatSettings
    @State private var seed: String
    private let save: (ChatSettings) -> Void

    init(settings: ChatSettings, save: @escaping (ChatSettings) -> Void) {
        _settings = State(initialValue: settings)
        _seed = State(initialValue: String(settings.seed))
        self.save = save
    }

    var body: some View {
        NavigationStack {
            Form {
                Section("System prompt") {
                    TextField("None", text: $settings.system, axis: .vertical)
                        .lineLimit(1...6)
                        .accessibilityLabel("System prompt")
                }
                Section("Sampling") {
                    Slider(value: $settings.temperature, in: 0...2, step: 0.05, label: { Text("Temperature") })
                    Text(String(format: "Temperature %.2f (0: always the most probable token)", settings.temperature))
                    Slider(value: $settings.topP, in: 0.05...1, step: 0.05, label: { Text("Top p") })
                    Text(String(format: "Top p %.2f", settings.topP))
                    TextField("Seed", text: $seed).keyboardType(.numberPad)
                }
                Section("Length") {
                    Stepper("At most \(settings.maxTokens) tokens", value: $settings.maxTokens, in: 16...2048, step: 16)
                }
            }
            .navigationTitle("Settings")
            .toolbar {
                ToolbarItem(placement: .cancellationAction) { Button("Cancel") { dismiss() } }
                ToolbarItem(placement: .confirmationAction) { Button("Save") { done() } }
            }
        }
    }

    private func done() {
        if let number: UInt64 = UInt64(seed) { settings.seed = number }
        save(settings)
        dismiss()
    }
}
